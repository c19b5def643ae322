"""The baton: one job that several processes of a machine pass to one another.

One process owns a job at a time. A baton opens it when there is something to do, does it, and closes it again, so that
the next process can have it: the workers of a web server share a queue, a lock, a limit in this way.

Rules:
  1. What is asked for is done in order, in a thread of the baton's own that is there as long as there is work.
  2. The job is kept for some tens of milliseconds at most (or for `keep` seconds, if that is longer) while work keeps
     coming; then others get it for sure, as the pause between is longer than any of theirs.
  3. Every reply is settled: with what the function returned or raised, or with why the job couldn't be had.
  4. The interpreter's exit waits for what was asked for, for `exit_timeout` seconds, and names on stderr what it could
     not do. A forked child gets `Forked`.

Doesn't know: what the functions do.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from time import monotonic, sleep
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar, TypeVarTuple, Unpack

from persistency import Closed, Forked, Job, JobLocked, Misuse, OpenOptions, Overloaded, Persistency, Reply, Transaction
from persistency.logfields import about
from persistency.recipes.baton_pace import HOLD_S, Pace, as_seconds
from persistency.recipes.baton_process import ends, look_after, seat_of
from persistency.recipes.runner import bytes_of, check_function
from persistency.recipes.waiting import unanswered

log: logging.Logger = logging.getLogger("persistency.recipes")

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

CALLS_MAX = 8192
BYTES_MAX = 32 * 1024 * 1024  # of their arguments
_SEAT_S = 0.005  # so often it is looked who has waited long enough for another baton of this process


class _Call(NamedTuple):
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    future: Future[Any]
    until: float  # when it has waited for the job long enough
    nbytes: int  # of its arguments


class Baton:
    """A job that several processes pass to one another; a runner, as a `Job` is one.

    `persistency`: of this process, on a root they share. `wait`: how many seconds a call waits for the job while others
    have it, before its reply raises `JobLocked`. `keep`: for how many seconds this process keeps the job after the last
    call, in case more is asked for; others wait meanwhile. `poll`: how many seconds may pass, at most, until somebody
    who waits for a change made by another process sees it. `exit_timeout`: how many seconds the exit of the interpreter
    may take to do what is still to be done. All others are options of `Persistency.open_job`.

    Leave a baton before its `Persistency`: what is asked for and not done when that is closed fails with `Closed`.

    Don't close a job by a handle of the same `Persistency` that was opened while a baton had it: to use a job both ways
    in one process, open it before the baton does, or through a `Persistency` of its own.
    """

    _pid = 0  # until it is known to be sound

    def __init__(
        self,
        persistency: Persistency,
        job_id: str,
        *,
        wait: float = 60.0,
        keep: float = 0.0,
        poll: float = 0.25,
        exit_timeout: float = 30.0,
        **options: Unpack[OpenOptions],
    ) -> None:
        if not isinstance(persistency, Persistency):
            raise Misuse(f"persistency must be a Persistency, not {type(persistency).__name__}")
        if persistency.root == ":memory:":
            raise Misuse("a job in memory is its process' own, and empty when it is opened again: use the job itself")
        persistency.has_job(job_id)  # is it an id at all?
        unknown = options.keys() - OpenOptions.__optional_keys__
        if unknown:
            raise TypeError(f"Baton() got an unexpected keyword argument {min(unknown)!r}")
        self._persistency = persistency
        self._id = job_id
        self._options = options
        self._wait = as_seconds(wait, "wait")
        self._keep = as_seconds(keep, "keep")
        self._poll = as_seconds(poll, "poll", above=True)
        self.exit_timeout: float = as_seconds(exit_timeout, "exit_timeout")
        self._seat = seat_of(persistency, job_id)
        self._lock = threading.RLock()  # `__del__` and signal handlers ask for things, too
        self._calls: deque[_Call] = deque()
        self._nbytes = 0  # of them all
        self._posted: SimpleQueue[None] = SimpleQueue()  # rung while the job is kept for more
        self._server: int | None = None  # the thread that has the work, or the mark of one that begins
        self._mark = 0  # below 0: no thread's
        self._inside: int | None = None  # the thread that is in one of the functions
        self._job: Job | None = None  # while the server has it
        self._doing: _Call | None = None
        self._failing: BaseException | None = None  # what it is telling those who wait
        self._pace = Pace()
        self._done: Reply[None] | None = None  # what `close` waits for
        self._done_future: Future[None] | None = None
        self._closed = False
        self._pid = os.getpid()
        look_after(self)

    @property
    def id(self) -> str:
        """The job's id."""
        return self._id

    @property
    def poll(self) -> float:
        """How many seconds may pass, at most, until somebody who waits sees a change made by another process."""
        return self._poll

    @property
    def place(self) -> Hashable:
        """What this baton has in common with other runners of the same job."""
        return self._persistency.root, self._id

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    def run(self, fn: Callable[[Transaction, *Ts], T], *args: *Ts) -> Reply[T]:
        """Have `fn(tx, *args)` called in one transaction, when the job can be had; see `Job.run`.

        The reply raises what `fn` raises; `JobLocked` if others had the job for `wait` seconds; `Closed` if the
        `Persistency` was closed; or why the job couldn't be opened. Raises `Misuse` for what isn't a plain function and
        inside a function that this baton is running, `Overloaded` if 8,192 calls wait already, or 32 MiB of bytes and
        text that are arguments of theirs, `Closed`, `Forked`.
        """
        self._check_here()
        check_function(fn)
        if self._inside == threading.get_ident():
            raise Misuse(
                f"{self!r} was asked to run something inside of what it is running",
                hint="Use the transaction the function was given: tx.run(fn, *args).",
            )
        future, reply = unanswered()
        call = _Call(fn, args, future, monotonic() + self._wait, bytes_of(args))
        with self._lock:
            if self._closed:
                raise Closed(f"{self!r} is closed", hint="Make a new Baton.")
            if self._server != threading.get_ident():
                if len(self._calls) >= CALLS_MAX:
                    raise Overloaded(f"{CALLS_MAX:,} calls wait already", hint="Wait for the replies of some first.")
                if self._nbytes and self._nbytes + call.nbytes > BYTES_MAX:
                    raise Overloaded(f"{self._nbytes:,} bytes wait already", hint="Wait for the replies of some first.")
                self._calls.append(call)
                self._nbytes += call.nbytes
                self._posted.put(None)
                mine = self._begin(call)
            else:
                mine = None
        if mine is None:
            self._do_at_once(call)
        elif mine:
            self._serve(self._mark)
        return reply

    def _do_at_once(self, call: _Call) -> None:
        """Do what a callback of a reply asks for: if it waited for its turn, it would wait for its own thread."""
        if self._job is not None:
            self._do(self._job, call)
        else:
            call.future.set_exception(self._failing or Closed(f"{self!r} has given the job back"))

    def _begin(self, call: _Call) -> bool:
        """See that somebody serves; return whether it is to be this thread. The lock is held."""
        if self._server is not None:
            return False
        # Not named as the engine's own threads: the exit doesn't wait for its end as it does for theirs.
        self._mark -= 1
        thread = threading.Thread(target=self._serve, args=(self._mark,), name=f"baton:{self._id}", daemon=True)
        self._server = self._mark
        if ends():  # a thread would be cut off in the middle
            return True
        try:
            thread.start()
        except RuntimeError:  # the interpreter is about to end, and starts no threads any more
            return True
        except BaseException:  # an interrupt: the thread, if it has begun, finds another mark, and the call isn't made
            self._server = None
            self._calls = deque(one for one in self._calls if one is not call)
            self._nbytes -= call.nbytes
            raise
        return False

    # -- in the thread that serves -------------------------------------------------------------------------------

    def _serve(self, mark: int) -> None:
        with self._lock:
            if self._server != mark:
                return
            self._server = threading.get_ident()
        try:
            while True:
                with self._lock:
                    if not self._calls:
                        self._leave_off()
                        return
                self._take_turn()
        except BaseException as error:  # thrown into this thread; nobody is to wait for it for ever
            with self._lock:
                self._leave_off()
            self._fail(error)
            raise

    def _leave_off(self) -> None:
        """Serve no longer. The lock is held: whoever asks for something from now on sees that nobody serves."""
        self._server = None
        if self._done_future is not None and not self._done_future.done():
            self._done_future.set_result(None)

    def _take_turn(self) -> None:
        """Have the job once, and do what there is to do."""
        self._pace.give_others_a_chance()
        if not self._seat.acquire(timeout=_SEAT_S):  # another baton of this process has it
            self._fail_late(JobLocked(f"job {self._id!r} is in use by another Baton of this process", os.getpid()))
            return
        try:
            shared = self._persistency.has_job(self._id)  # then it is somebody's, who is not to find it closed
            job = self._open()
            if job is None:
                return
            begun = monotonic()
            self._job = job
            try:
                self._work(job, begun)
            finally:
                self._job = None
                if not shared:
                    self._close_job(job)
                self._pace.let_go(begun)
        except Forked:
            raise
        except Exception as error:
            self._fail(error)
        finally:
            self._seat.release()

    def _open(self) -> Job | None:
        """Open the job, trying again while others have it; `None` if nobody wants it any more."""
        tries = 0
        while True:
            try:
                job = self._persistency.open_job(self._id, **self._options)
            except JobLocked as locked:
                if not self._fail_late(locked):
                    return None
            else:
                self._pace.path = job.path
                return job
            tries += 1
            self._pace.wait(tries)

    def _work(self, job: Job, begun: float) -> None:
        """Do what is asked for, and keep the job for more, within the time there is for that."""
        last = begun + max(HOLD_S, self._keep)
        idle_since = begun
        while monotonic() < last:
            with self._lock:
                call = self._calls.popleft() if self._calls else None
                self._nbytes -= 0 if call is None else call.nbytes
            if call is not None:
                self._do(job, call)
                idle_since = monotonic()
                continue
            left = min(idle_since + self._keep, last) - monotonic()
            if left <= 0 or self._closed or ends():
                return
            try:
                self._posted.get(timeout=left)
            except Empty:
                return

    def _do(self, job: Job, call: _Call) -> None:
        """Run one function, and settle its reply."""

        def run(tx: Transaction, *args: Any) -> Any:
            before, self._inside = self._inside, threading.get_ident()
            try:
                return call.fn(tx, *args)
            finally:
                self._inside = before

        before, self._doing = self._doing, call
        try:
            answer = job.run(run, *call.args).result()
        except BaseException as error:  # whatever it is, it is the caller's
            self._doing = before
            call.future.set_exception(error)
        else:
            self._doing = before
            call.future.set_result(answer)

    def _close_job(self, job: Job) -> None:
        try:
            job.close()
        except Exception as error:
            # What was asked for is answered; this is about events that functions have posted, or about the file.
            log.exception("job %r: closing it failed", self._id, extra=about("baton_close_failed", self._id, error))

    # -- failures ------------------------------------------------------------------------------------------------

    def _fail_late(self, error: Exception) -> bool:
        """Tell those who have waited long enough; return whether anybody is left."""
        now = monotonic()
        with self._lock:
            late = [call for call in self._calls if call.until <= now]
            self._calls = deque(call for call in self._calls if call.until > now)
            self._nbytes -= sum(call.nbytes for call in late)
        self._settle_failed(late, error)
        return bool(self._calls)

    def _fail(self, error: BaseException) -> None:
        """Tell everybody."""
        with self._lock:
            calls, self._calls, self._nbytes = self._calls, deque(), 0
        self._settle_failed(calls, error)

    def _settle_failed(self, calls: Iterable[_Call], error: BaseException) -> None:
        before, self._failing = self._failing, error
        try:
            for call in calls:
                call.future.set_exception(error)
        finally:
            self._failing = before

    # -- closing -------------------------------------------------------------------------------------------------

    def close(self, timeout: float | None = None) -> None:
        """Do what was asked for, and refuse everything from now on. A second call is nothing.

        Raises `TimeoutError` after `timeout` seconds; what is left is still being done. Failures are told by replies.
        """
        self._leave().result(timeout)

    async def aclose(self) -> None:
        """Do what `close` does, without blocking the event loop."""
        await self._leave()

    def _leave(self) -> Reply[None]:
        self._check_here()
        if self._inside == threading.get_ident() or self._server == threading.get_ident():
            raise Misuse(f"{self!r} can't be closed by what it is running: nobody would end that")
        with self._lock:
            self._closed = True
            if self._done is None:
                self._done_future, self._done = unanswered()
                if self._server is None:
                    self._done_future.set_result(None)
            self._posted.put(None)
            return self._done

    def _check_here(self) -> None:
        if self._pid != os.getpid():
            raise Forked(f"{self!r} is the parent process'", hint="Make a Baton of its own in this process.")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"<Baton {self._id!r}{' (closed)' if self._closed else ''}>"

    # -- exit ----------------------------------------------------------------------------------------------------

    def finish(self, deadline: float) -> int:
        """Wait for what was asked for; return how much could not be done."""
        self._posted.put(None)  # it is kept for nobody any more
        while self._server is not None and monotonic() < deadline:
            sleep(0.001)
        return len(self._calls) + (self._doing is not None)
