"""The engine: `Persistency` owns a root, opens jobs by their ids and closes them.

Rules:
  1. Making one touches nothing: the root is created by the first job that is opened.
  2. This is the only place that names a storage adapter, and the only one that knows a clock.
  3. `p[job_id]` is the way by id; there is no second set of verbs.

Doesn't know: how a job is run, or stored.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator
from os import PathLike, fspath, urandom
from pathlib import Path
from typing import Any, ClassVar, Unpack

from persistency import lifecycle
from persistency.actor.bounds import OnFull
from persistency.actor.clock import reading, system_ms
from persistency.actor.loops import running_loop
from persistency.actor.reply import Reply
from persistency.arguments import as_count, as_seconds
from persistency.driving import adrive, drive
from persistency.errors import Closed, Corrupt, Failure, Forked, JobNotFound, Misuse, WriteFailed
from persistency.job import Job
from persistency.ops import Ttl
from persistency.options import DEFAULT, Default, OnError, OpenOptions, checked
from persistency.reader import Readers, Reading
from persistency.registry import Opener, Site
from persistency.slots import Slots
from persistency.storage.directory import DirectoryRoot
from persistency.storage.files import real_root
from persistency.storage.port import Durability, Root
from persistency.sweeps import Sweeping

MEMORY = ":memory:"
OPENING_SECONDS = 5.0  # so long SQLite waits for another process' lock; a shorter timeout needs a thread of its own

# A site lives as long as a Persistency or a worker on it does.
_sites: weakref.WeakValueDictionary[Path | str, Site] = weakref.WeakValueDictionary()
_sites_lock = threading.RLock()  # a signal handler may make a Persistency too


def _site(root: str | PathLike[str]) -> tuple[Site, Path | str | None]:
    """Return what this process knows of a root, and its real path or URL; memory is nobody else's."""
    if not isinstance(root, str | PathLike) or not isinstance(fspath(root), str):
        raise Misuse(f"root must be a path, not {type(root).__name__}: pass a directory, or ':memory:'")
    if root == MEMORY:
        from persistency.storage.memory import MemoryRoot  # only here: hardly any service has it

        return Site(MemoryRoot(), near=True), None
    if not root:
        raise Misuse("root is empty: pass a directory, or ':memory:'")
    place: Path | str = root if isinstance(root, str) and "://" in root else real_root(root)
    with _sites_lock:
        site = _sites.get(place)
        if site is None:
            site = Site(_on_server(place)) if isinstance(place, str) else Site(DirectoryRoot(place), near=True)
            _sites[place] = site
        return site, place


def _on_server(url: str) -> Root:
    """Return the root that a URL names. Raises `Misuse`."""
    scheme = url.partition("://")[0]
    if scheme not in ("postgresql", "postgres"):
        raise Misuse(
            f"root names an engine that isn't there, {scheme!r}: pass a directory, ':memory:' or a postgresql:// URL"
        )
    try:
        from persistency.storage.postgres.address import parsed  # only here: it needs an extra
        from persistency.storage.postgres.root import PostgresRoot
    except ImportError as error:
        hint = "Install it with: pip install 'persistency[postgres]'"
        raise Misuse(f"a root on PostgreSQL needs psycopg 3, which can't be imported: {error}", hint=hint) from error
    return PostgresRoot(parsed(url))


class Persistency(Sweeping, Reading):
    """A root directory of jobs. Any thread may use it.

    `root`: a directory, existing or not, or `":memory:"`. `max_live_jobs` is how many jobs may have a thread and a
    connection at once (`None`: all of them); of more, those that were used the longest ago rest until somebody uses
    them, and so does one that nobody used for `idle_ttl` seconds. Their handles don't show it. `open_timeout` is how
    many seconds opening a job may wait for others (`None`: as long as it takes; of less than 5 it may take all in all),
    `exit_timeout` how many the exit of the interpreter may take to write what is waiting. `clock` returns Unix seconds,
    like `time.time`. What takes `slow_after` seconds or longer is told in the log `persistency.slow` (`None`: nothing).
    """

    _closed = True  # until it is known to be sound; see __del__
    _instance: ClassVar[Persistency | None] = None
    _instance_lock = threading.RLock()

    def __init__(
        self,
        root: str | PathLike[str],
        *,
        max_live_jobs: int | None = None,
        idle_ttl: float | None = None,
        open_timeout: float | None = 60.0,
        exit_timeout: float = 30.0,
        clock: Callable[[], float] | None = None,
        slow_after: float | None = None,
    ) -> None:
        self._open_timeout = as_seconds(open_timeout, "open_timeout")
        live_max, idle_ttl = (
            None if max_live_jobs is None else as_count(max_live_jobs, "max_live_jobs", 1),
            as_seconds(idle_ttl, "idle_ttl"),
        )
        limited = live_max is not None or idle_ttl is not None
        slots = Slots(live_max, idle_ttl, self._open_timeout) if limited else None
        self._exit_timeout = as_seconds(exit_timeout, "exit_timeout", optional=False) or 0.0
        if clock is not None and not callable(clock):
            raise Misuse(f"clock must be callable, not {type(clock).__name__}: pass a function like time.time")
        self._read_ms = system_ms if clock is None else reading(clock)
        self._site, self._path = _site(root)
        self._lock = threading.RLock()
        self._jobs: dict[str, Job] = {}
        self._readers = Readers()
        self._options: dict[str, Any] = {}  # what `instance` was first called with
        forget = _forgetter(weakref.ref(self))
        self._opener = Opener(self._read_ms, self._exit_timeout, slots, forget, as_seconds(slow_after, "slow_after"))
        self._forked = False
        self._closed = False
        _everywhere.add(self)

    # -- the singleton -------------------------------------------------------------------------------------------

    @classmethod
    def instance(cls, root: str | PathLike[str] | None = None, **options: Any) -> Persistency:
        """Return the process-wide `Persistency`, made by the first call that names a root.

        Raises `Misuse` for another root or other options than its own, and `Closed` if there is none and none named.
        """
        with cls._instance_lock:
            found = cls._instance
            if found is not None and found._forked:
                raise Forked("the instance is the parent process'", hint="Call Persistency.reset() here first.")
            if found is None or found._closed:
                if root is None:
                    raise Closed("there is no instance yet", hint="Make it with Persistency.instance(root).")
                found = cls._instance = cls(root, **options)
                found._options = options
            elif root is not None and (_site(root)[1] != found._path or (found._path is None and root != MEMORY)):
                raise Misuse(f"root {root!r} isn't the instance's, {found.root!r}: leave it out, or call reset() first")
            else:
                different = [name for name in options if found._options.get(name, DEFAULT) != options[name]]
                if different:
                    raise Misuse(f"the instance was made with another {', '.join(different)}: call reset() first")
            return found

    @classmethod
    def reset(cls) -> None:
        """Close the process-wide `Persistency` and forget it; nothing happens if there is none."""
        with cls._instance_lock:
            found, cls._instance = cls._instance, None
        if found is not None and not found._forked:
            found.close()

    @property
    def root(self) -> str:
        """The root's real path, `":memory:"`, or its URL without the password."""
        return self._site.root.name

    # -- jobs ----------------------------------------------------------------------------------------------------

    def open_job(
        self,
        job_id: str | None = None,
        *,
        ttl: Ttl | Default | None = DEFAULT,
        durability: Durability | Default = DEFAULT,
        max_bytes: int | Default | None = DEFAULT,
        mailbox_ops_max: int | Default = DEFAULT,
        mailbox_bytes_max: int | Default = DEFAULT,
        requests_max: int | Default = DEFAULT,
        on_full: OnFull | Default = DEFAULT,
        full_timeout: float | Default | None = DEFAULT,
        sync_interval: float | Default | None = DEFAULT,
        stall_timeout: float | Default = DEFAULT,
        feed_changes_max: int | Default = DEFAULT,
        inline: bool | Default = DEFAULT,
        on_error: OnError | Default | None = DEFAULT,
    ) -> Job:
        """Open a job, creating it if need be, and return its handle: the same one for an id that is open.

        Without an id the job gets a fresh, unguessable one (24 hex digits).

        ttl: seconds, or a `timedelta`, after which the job is over: its handles raise `Closed`, its files go with the
          next `purge_expired`. Without, one that is stored keeps its end, and a new one has none.
        durability: `"process"` (the default): what is committed survives the end of the process; `"power"`: every
          commit is on the medium before it is answered.
        max_bytes: how many bytes the payloads of all rows may have together (`None`, the default: any number). A write
          that would take them over it fails with `QuotaExceeded`; one that doesn't grow is always allowed.
        mailbox_ops_max, mailbox_bytes_max, requests_max: how many operations (8,192), bytes of keys and payloads
          (32 MiB) and requests (8,192) may wait. More lets a producer run further ahead; a read then waits longer.
        on_full: `"block"` (the default): a plain thread waits for room, up to `full_timeout` (60 s), then
          `Overloaded`; `"raise"`: `Overloaded` at once.
        sync_interval: within how many seconds (1) what was committed is brought onto the medium, which bounds what a
          power cut can take (`None`: only with `flush(sync=True)` and at the end).
        stall_timeout: how many seconds (60) a fault of the system, such as a full disk, may last.
        feed_changes_max: how many changes are kept for `changes` and `ChangeFeed` (0: none).
        inline: whether point reads may be answered in the thread of an event loop (`True`).
        on_error: called as `on_error(job_id, failures)`, in a thread of its own, when events have failed.

        Raises `Misuse` for a bad id or option, or one that differs from an open job's, `JobLocked` if another process
        has the job, `Corrupt`, `SchemaTooNew` or another `StorageError` if its file can't be used, `TimeoutError`.
        """
        given = dict(locals())
        # Here it can't be given up half way: SQLite waits for other processes, in all, for as long as that.
        here = (self._open_timeout is None or self._open_timeout >= OPENING_SECONDS) and running_loop() is None
        return drive(self._opening(given.pop("job_id"), given, here=here), self._open_timeout)

    async def aopen_job(self, job_id: str | None = None, **options: Unpack[OpenOptions]) -> Job:
        """Do what `open_job` does, without blocking the event loop."""
        if unknown := options.keys() - _OPTION_NAMES:
            raise TypeError(f"aopen_job() got an unexpected keyword argument {min(unknown)!r}")
        return await adrive(self._opening(job_id, dict(options), here=False), self._open_timeout)

    def _opening(self, job_id: str | None, given: dict[str, Any], *, here: bool) -> Generator[Reply[None], None, Job]:
        given.pop("self", None)
        given = checked(given)
        self._check_open()
        job_id = urandom(12).hex() if job_id is None else job_id
        while True:
            job = yield from self._site.open(job_id, given, self._opener, here=here)
            try:
                with self._lock:
                    held = self._jobs.get(job_id)
                    if (held is None or held.closed) and not self._closed:
                        self._jobs[job_id] = job
                        return job
            except BaseException:  # an interrupt: nobody else knows of this handle
                job._leave(flush=False)
                raise
            # A second lease isn't needed; if the first was given back meanwhile, it was the last one: try again.
            job._leave(flush=False)
            if self._closed:
                raise Closed(f"{self!r} was closed while job {job_id!r} opened")
            if held is not None and not held.closed:
                return held

    def _check_here(self) -> None:
        if self._forked:
            raise Forked(f"{self!r} is the parent process'", hint="Make a new Persistency in this process.")

    def _check_open(self) -> None:
        self._check_here()
        if self._closed:
            raise Closed(f"{self!r} is closed", hint="Make a new Persistency.")

    def job(self, job_id: str) -> Job:
        """Return the handle of an open job. Raises `JobNotFound` if it isn't open here."""
        self._check_here()
        self._site.root.path(job_id)
        with self._lock:
            job = self._jobs.get(job_id)
        if job is None or job.closed:
            raise JobNotFound(f"no open job with id {job_id!r}")
        return job

    def __getitem__(self, job_id: str) -> Job:
        return self.job(job_id)

    def has_job(self, job_id: str) -> bool:
        """Say whether a job is open here."""
        self._check_here()
        self._site.root.path(job_id)
        job = self._jobs.get(job_id)
        return job is not None and not job.closed

    def __contains__(self, job_id: object) -> bool:
        try:
            return self.has_job(job_id)  # type: ignore[arg-type]  # anything may be asked for
        except Misuse:
            return False

    def __iter__(self) -> Iterator[str]:
        self._check_here()
        with self._lock:
            return iter([job_id for job_id, job in self._jobs.items() if not job.closed])

    def __len__(self) -> int:
        return len(self._jobs)

    def __bool__(self) -> bool:
        return True  # an empty one is still there

    def close_job(self, job_id: str, timeout: float | None = None) -> None:
        """Close a job as its handle's `close` does; one that isn't open is fine."""
        self._check_here()
        self._site.root.path(job_id)
        timeout = as_seconds(timeout, "timeout")
        with self._lock:
            job = self._jobs.get(job_id)
        if job is not None:
            job.close(timeout)

    def drop_job(self, job_id: str) -> list[Path]:
        """Close a job and delete its files; return those removed. A job that never existed is fine.

        Raises `JobLocked` if it is open in another process, or through another `Persistency`.
        """
        return drive(self._dropping(job_id), None)

    async def adrop_job(self, job_id: str) -> list[Path]:
        """Do what `drop_job` does, without blocking the event loop."""
        return await adrive(self._dropping(job_id, aside=True), None)

    def _dropping(self, job_id: str, *, aside: bool = False) -> Generator[Reply[Any], Any, list[Path]]:
        self._check_open()
        self._site.root.path(job_id)
        with self._lock:
            job = self._jobs.get(job_id)
        if job is not None:
            # What it reports was told already, and what it is about is to be deleted anyway.
            with contextlib.suppress(WriteFailed, Corrupt):
                yield job._leave()
        return (yield from self._site.drop(job_id, aside=aside))

    # -- closing -------------------------------------------------------------------------------------------------

    def close(self, timeout: float | None = None) -> None:
        """Close every job that is open here; a second call is nothing.

        Raises `WriteFailed` with the failures of all of them, or `TimeoutError` after `timeout` seconds, naming those
        that are still closing; they keep closing.
        """
        drive(self._closing(), as_seconds(timeout, "timeout"))

    async def aclose(self) -> None:
        """Do what `close` does, without blocking the event loop."""
        await adrive(self._closing(), None)

    def _closing(self) -> Generator[Reply[None], None, None]:
        self._check_here()
        with self._lock:
            for job in self._jobs.values():
                job._check_outside()
            self._closed = True
            jobs = dict(self._jobs)  # each is forgotten as it closes: a second call finds the rest
        leaving = {job_id: job._leave() for job_id, job in jobs.items()} | self._readers.leave()
        failures: list[Failure] = []
        omitted = 0
        first: Exception | None = None
        for reply in leaving.values():
            try:
                yield reply
            except WriteFailed as failed:
                failures += failed.failures
                omitted += failed.omitted
            except TimeoutError:
                late = ", ".join(repr(job_id) for job_id, other in leaving.items() if not other.done())
                raise TimeoutError(f"still closing: {late}; they keep closing") from None
            except Exception as error:
                first = first or error
        if failures or omitted:
            raise WriteFailed(failures, omitted) from first
        if first is not None:
            raise first

    def __repr__(self) -> str:
        return f"<Persistency {self.root!r}{' (closed)' if self._closed else ''}>"

    def __del__(self) -> None:
        if not self._closed and not self._forked and self._jobs:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)


def _forgetter(owner: weakref.ref[Persistency]) -> Callable[[Job], None]:
    """Return what a closed handle calls, so that its Persistency forgets it; without keeping that alive."""

    def forget(job: Job) -> None:
        found = owner()
        if found is not None:
            with found._lock:
                if found._jobs.get(job.id) is job:
                    del found._jobs[job.id]

    return forget


def _in_child() -> None:
    """In a forked child: the parent's roots and jobs are none of its business."""
    global _sites_lock  # noqa: PLW0603  # another thread of the parent may have had it
    _sites_lock = threading.RLock()
    _sites.clear()
    Persistency._instance_lock = threading.RLock()
    for found in list(_everywhere):
        found._forked = True


_everywhere: weakref.WeakSet[Persistency] = weakref.WeakSet()
lifecycle.in_child.append((__name__, "_in_child"))
_OPTION_NAMES = OpenOptions.__optional_keys__
