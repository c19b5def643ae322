"""Places: the jobs that the caches of this process have open, one for each root and id, whichever thread asks.

Django makes a cache object per alias and thread, and tells it to close at the end of every request. So what is open
belongs to the process: it is opened by the first use, and stays.

Rules:
  1. Shared (`SHARED`): what changes something goes through a `Baton`, which has the job only as long as it has work.
     What only reads goes past it, by a `Reader`, and waits for no other process.
  2. Alone: the job is opened and kept, and reads are answered in place. Another process that wants it gets `JobLocked`.
  3. A forked child begins with nothing open. What was its parent's it leaves alone.
  4. What was found broken is given up and opened anew by the next use.
  5. At the end of the process readers are closed, and none is opened any more.

Doesn't know: what is stored; Django, but for its settings.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol, TypeVar, TypeVarTuple

from django.core.exceptions import ImproperlyConfigured
from django.core.signals import setting_changed

from persistency import (
    Closed,
    Found,
    Job,
    JobLocked,
    JobNotFound,
    Key,
    Persistency,
    PersistencyError,
    Poisoned,
    Reader,
    Reply,
    Transaction,
    Unavailable,
)
from persistency.integrations.django.options import Settings
from persistency.integrations.django.rows import VALUES, Census
from persistency.integrations.django.steps import Steps
from persistency.recipes.baton import Baton

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
_EXIT_S: Final = 30.0
_STALL_S: Final = 60.0  # as the engine has it


class Place(Protocol):
    """A job, as the caches of this process use it."""

    settings: Settings
    census: Census
    dropping: set[Key]
    """What is just being removed, as it couldn't be read."""

    def open(self) -> None:
        """Open what isn't, waiting for it."""

    async def aopen(self) -> None:
        """Do what `open` does, without blocking the event loop."""

    def get(self, at: Key) -> Reply[bytes | None] | None:
        """Ask for a payload; `None` if nothing was ever written."""

    def get_many(self, keys: list[Key]) -> Reply[Found] | None:
        """Ask for those payloads that there are; `None` if nothing was ever written."""

    def run(self, fn: Callable[[Transaction, *Ts], T], *args: *Ts) -> Reply[T]:
        """Ask for a transaction."""
        raise NotImplementedError

    def forget(self) -> None:
        """Give up what was found broken; the next use opens it anew."""

    def close(self, timeout: float | None) -> None:
        """Finish what was asked for, and give everything up."""


class Stale(Exception):
    """What was read with is of no use any more; another try reads with something new. The cause says why."""


def reading(ask: Callable[[*Ts], Reply[T] | None], *args: *Ts) -> Steps[T | None]:
    """Ask for something and return the answer. Raises `Stale` if it may be there by another way."""
    try:
        reply = ask(*args)
        return None if reply is None else (yield reply)
    except (Unavailable, Closed, Poisoned) as error:
        raise Stale from error


class Alone:
    """A job that this process has for itself."""

    def __init__(self, settings: Settings) -> None:
        self.settings: Settings = settings
        self.census: Census = Census()
        self.dropping: set[Key] = set()
        self._persistency = Persistency(settings.root, clock=settings.clock)
        self._job: Job | None = None

    def open(self) -> None:
        """Open the job. Raises `JobLocked` if another process has it."""
        if self._job is None:
            try:
                self._job = self._persistency.open_job(self.settings.job_id, **_options(self.settings))
            except JobLocked as locked:
                raise self._taken(locked) from locked
            except Closed as closed:
                raise Stale from closed

    async def aopen(self) -> None:
        """Do what `open` does, without blocking the event loop."""
        if self._job is None:
            try:
                self._job = await self._persistency.aopen_job(self.settings.job_id, **_options(self.settings))
            except JobLocked as locked:
                raise self._taken(locked) from locked
            except Closed as closed:
                raise Stale from closed

    def _taken(self, locked: JobLocked) -> JobLocked:
        job_id, root = self.settings.job_id, self.settings.root
        return JobLocked(
            f"process {locked.pid} has the job {job_id!r} in {root!r}, and this cache wants it for itself: "
            'it has "SHARED": False',
            locked.pid,
            hint='Leave out "SHARED" where several processes use one cache, such as the workers of a web server.',
        )

    def get(self, at: Key) -> Reply[bytes | None]:
        """Ask for a payload."""
        assert self._job is not None
        return self._job.get(VALUES, at)

    def get_many(self, keys: list[Key]) -> Reply[Found]:
        """Ask for those payloads that there are."""
        assert self._job is not None
        return self._job.get_many(VALUES, keys)

    def run(self, fn: Callable[[Transaction, *Ts], T], *args: *Ts) -> Reply[T]:
        """Ask for a transaction."""
        assert self._job is not None
        return self._job.run(fn, *args)

    def forget(self) -> None:
        """Give up the job: it was poisoned, or its file is another one now."""
        with _gate:
            if _places.get(self.settings.place) is not self:
                return  # it was already
            del _places[self.settings.place]
        with contextlib.suppress(PersistencyError, TimeoutError):  # whoever found it broken was told
            self.close(_EXIT_S)

    def close(self, timeout: float | None) -> None:
        """Finish what was asked for, and give everything up."""
        self._persistency.close(timeout)


class Shared:
    """A job that processes pass to one another, to write; whoever has it, each reads it for itself."""

    def __init__(self, settings: Settings) -> None:
        self.settings: Settings = settings
        self.census: Census = Census()
        self.dropping: set[Key] = set()
        self._persistency = Persistency(settings.root, clock=settings.clock)
        wait, keep = settings.wait, settings.keep
        self._baton = Baton(self._persistency, settings.job_id, wait=wait, keep=keep, **_options(settings))
        self._reader: Reader | None = None
        self._opening = threading.Lock()

    def open(self) -> None:
        """Open a reader, if there is something to be read."""
        if self._reader is None:
            with _opening():
                self._have(self._persistency.open_reader(self.settings.job_id))

    async def aopen(self) -> None:
        """Do what `open` does, without blocking the event loop."""
        if self._reader is None:
            with _opening():
                self._have(await self._persistency.aopen_reader(self.settings.job_id))

    def _have(self, reader: Reader) -> None:
        with self._opening:
            mine = self._reader is None
            if mine:
                self._reader = reader
        if not mine or _ended:  # another thread was faster, or the process ends
            reader.close()

    def get(self, at: Key) -> Reply[bytes | None] | None:
        """Ask for a payload; `None` if nothing was ever written."""
        reader = self._reader
        return None if reader is None else reader.get(VALUES, at)

    def get_many(self, keys: list[Key]) -> Reply[Found] | None:
        """Ask for those payloads that there are; `None` if nothing was ever written."""
        reader = self._reader
        return None if reader is None else reader.get_many(VALUES, keys)

    def run(self, fn: Callable[[Transaction, *Ts], T], *args: *Ts) -> Reply[T]:
        """Ask for a transaction, when the job can be had. The reply raises `JobLocked` if it can't for too long."""
        return self._baton.run(fn, *args)

    def forget(self) -> None:
        """Give up the reader: its file is another one now. A baton opens the job anew each time."""
        self.census = Census()  # versions of another file say nothing
        with self._opening:
            reader = self._reader
            if not _ended:  # there is no other one then
                self._reader = None
        if reader is not None:
            reader.close()

    def close(self, timeout: float | None) -> None:
        """Finish what was asked for, and give everything up."""
        try:
            self._baton.close(timeout)
        finally:
            self._persistency.close(timeout)
            self.forget()


@contextlib.contextmanager
def _opening() -> Iterator[None]:
    """Open a reader in here: a job that isn't there needs none, and one that is just being made is tried again."""
    try:
        yield
    except JobNotFound:
        return
    except (Unavailable, Closed) as error:
        raise Stale from error


def _options(settings: Settings) -> dict[str, Any]:
    """Return the options of `open_job`."""
    return {
        "max_bytes": settings.max_bytes,
        "durability": settings.durability,
        # A full disk keeps a write, and those behind it, no longer than another process may.
        "stall_timeout": min(_STALL_S, settings.wait),
    }


_places: dict[tuple[str, str], Place] = {}
_gate = threading.RLock()
_ended = False


def place_of(settings: Settings) -> Place:
    """Return the place of a job, the same one for all caches of this process. Nothing is opened.

    Raises `ImproperlyConfigured` if another cache wants the job opened differently.
    """
    found = _places.get(settings.place)
    if found is None:
        with _gate:
            found = _places.get(settings.place)
            if found is None:
                found = _places[settings.place] = (Shared if settings.shared else Alone)(settings)
    if found.settings != settings:
        differing = ", ".join(found.settings.differing(settings))
        raise ImproperlyConfigured(
            f"two caches of the job {settings.job_id!r} in {settings.root!r} differ in {differing}: "
            "give them the same OPTIONS, or another JOB"
        )
    return found


def release(timeout: float | None = None) -> None:
    """Close every job that caches of this process have open; the next use of a cache opens its job anew.

    For tests that remove the directory, and for whoever wants to use the job in another way. What is in memory is gone
    then. Raises `TimeoutError` after `timeout` seconds; it is still being closed then.
    """
    with _gate:
        places = list(_places.values())
        _places.clear()
    for place in places:
        place.close(timeout)


def _on_setting_changed(*, setting: str, **_more: Any) -> None:
    """Close what is open when a test puts other `CACHES` in force: its directory may be about to go."""
    if setting == "CACHES":
        release()


def _in_child() -> None:
    """In a forked child: another thread of the parent may have had the lock, and what is open is the parent's."""
    global _gate, _ended  # of this process
    _gate, _ended = threading.RLock(), False
    _places.clear()


def _at_exit() -> None:
    """At the end of the process close what is read with: what is to be written the batons and jobs look after."""
    global _ended  # noqa: PLW0603  # of this process
    _ended = True
    for place in list(_places.values()):
        if isinstance(place, Shared):
            with contextlib.suppress(PersistencyError):
                place.forget()


atexit.register(_at_exit)
os.register_at_fork(after_in_child=_in_child)
setting_changed.connect(_on_setting_changed)
