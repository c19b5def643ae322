"""Lifecycle: what happens to open jobs when the interpreter exits, is told to end, or is forked.

At exit one hook, registered when this module is imported, so that it runs after the hooks of everybody who imported it,
has every worker write what waits, tidy its file up and end its thread, all of them side by side, and names on
stderr what could not be written in time. Nothing is closed: whoever posts later, from an earlier hook or a thread
that outlives main, is served in its own thread.

A fork waits a moment until no worker is in the middle of a turn. In the child every handle of the parent's raises
`Forked`; the child may open jobs of its own.

Rules:
  1. Workers are daemon threads: an interpreter that exits never waits for one that sleeps.
  2. No thread is started once the hook has begun.
  3. In a child nothing of the parent's is written, and nobody waits for a thread that isn't there.

Doesn't know: roots, leases, what a worker does.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import weakref
from functools import partial
from time import monotonic
from typing import Any, NamedTuple, Self

from persistency.actor import errand
from persistency.actor.failures import FailureLog
from persistency.actor.reply import Reply
from persistency.actor.settling import abandon, ready
from persistency.actor.starter import starter
from persistency.actor.worker import Worker
from persistency.errors import Forked, Misuse

_TELL_SECONDS_MAX = 5.0
_LOOK_SECONDS = 0.1
_INTERRUPTS_MAX = 2  # the second one gives up
# So long a fork waits for those who are in the middle of something. In a child of one that doesn't, SQLite may hang:
# what it has locked for a moment, for all of its connections, stays locked there.
_FORK_SECONDS = 2.0


class _Charge(NamedTuple):
    job_id: str
    worker: Worker
    failures: FailureLog
    exit_timeout: float


_lock = threading.RLock()  # a signal handler may open a job too
_charges: dict[int, _Charge] = {}
_workers: weakref.WeakSet[Worker] = weakref.WeakSet()  # of the jobs that are open, after the exit hook, too
_exiting = False
_finalized_in: int | None = None  # the process in which multiprocessing calls the hook, too


def look_after(job_id: str, worker: Worker, failures: FailureLog, exit_timeout: float) -> None:
    """Have a worker drained at exit, within `exit_timeout` seconds; once the hook has begun nobody waits any more."""
    _finalize_child()
    with _lock:
        _workers.add(worker)
        if _exiting:
            return
        _charges[id(worker)] = _Charge(job_id, worker, failures, exit_timeout)


def begin(worker: Worker, *, here: bool = False) -> None:
    """Start a worker: its thread, or, once main has ended, its store alone, which posters then serve themselves.

    `here`: open its store in this thread; it gets its own when there is something for it.
    """
    if ends():
        worker.start_unattended()
    elif here:
        worker.start_here(_call)
    else:
        worker.start()


def _call(worker: Worker) -> None:
    """Have a worker that naps begun, by whoever starts threads. Raises `RuntimeError` if nobody can."""
    if _exiting:
        raise RuntimeError("no thread is started any more")
    # In a thread even when main has ended: there it holds up nobody else, and the exit hook is still to come.
    starter.note(partial(worker.come, Worker.start))


def ends() -> bool:
    """Say whether the process is about to end: no thread can be relied on any more."""
    if _exiting:
        return True
    main = threading.main_thread()
    if sys.version_info < (3, 13) and main.ident == threading.get_ident():
        # What `is_alive` says in the end; there an interrupt that came just then had main taken for dead ever after.
        return bool(getattr(main, "_is_stopped", False))
    return not main.is_alive()


def forget(worker: Worker) -> None:
    """Leave a worker that is closed out of it."""
    with _lock:
        _charges.pop(id(worker), None)
        _workers.discard(worker)


# -- exit ---------------------------------------------------------------------------------------------------------


class _Interrupts:
    """Counts signals that ask for an end while it is entered, instead of letting them tear the exit hook apart."""

    count = 0

    def __enter__(self) -> Self:
        self._before: dict[int, Any] = {}
        # Elsewhere than in the main thread there are no signals to take.
        with contextlib.suppress(ValueError):
            for number in (signal.SIGINT, *_ours()):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _note(self, *_: object) -> None:
        self.count += 1


def _at_exit() -> None:
    global _exiting  # noqa: PLW0603  # the one thing a process can be in
    with _Interrupts() as interrupts:
        _exiting = True
        with _lock:
            charges = sorted(_charges.values(), key=lambda charge: charge.worker.naps_alone)  # they wait for nobody
        begun = monotonic()
        longest = max((charge.exit_timeout for charge in charges), default=0.0)
        for reply in errand.going():  # they ask the jobs for what they need, so these come after
            _wait(reply, begun + longest / 2, interrupts)
        leaving = [(charge, _retired(charge, begun + charge.exit_timeout, interrupts)) for charge in charges]
        told = False
        for charge, reply in leaving:
            while not reply.done() and interrupts.count < _INTERRUPTS_MAX and monotonic() < begun + charge.exit_timeout:
                _wait(reply, min(begun + charge.exit_timeout, monotonic() + _LOOK_SECONDS), interrupts)
                if interrupts.count and not told:
                    told = True
                    pending = sum(charge.worker.statistics().pending for charge, _ in leaving)
                    if pending:
                        _say(f"writing {pending} operations; interrupt again to give up")
            if not reply.done():
                pending = charge.worker.statistics().pending
                left = f"{pending} operations" if pending else "what it is in the middle of"
                within = "" if interrupts.count else f" within {charge.exit_timeout} s"
                _say(f"job {charge.job_id!r}: {left} could not be written{within} at exit")
            charge.failures.wait_told(min(_TELL_SECONDS_MAX, charge.exit_timeout))
        # What is kept here to the very end would keep its users' modules from ending in order.
        _charges.clear()
        others = [thread for thread in threading.enumerate() if not thread.name.startswith("persistency:")]
        if any(thread.daemon for thread in others):
            _keep_for_ever(charges)


def _retired(charge: _Charge, until: float, interrupts: _Interrupts) -> Reply[Any]:
    """Have a worker write what waits; one that can't must not keep the others from it."""
    left = until - monotonic()
    if charge.worker.naps_alone and (left <= 0 or interrupts.count >= _INTERRUPTS_MAX):
        return ready()  # nothing waits: it would only be tidied up, here
    try:
        return charge.worker.retire(max(0.0, left))
    except Exception as error:
        _say(f"job {charge.job_id!r}: {error}")
        return ready()


def _wait(reply: Reply[Any], until: float, interrupts: _Interrupts) -> None:
    """Wait for a reply; now and then it is looked whether Ctrl-C was typed."""
    while not reply.done() and (left := until - monotonic()) > 0 and interrupts.count < _INTERRUPTS_MAX:
        with contextlib.suppress(TimeoutError):
            reply.exception(min(left, _LOOK_SECONDS))


def _say(text: str) -> None:
    print(f"persistency: {text}", file=sys.stderr)


def _keep_for_ever(charges: list[_Charge]) -> None:
    """Keep stores from being torn down under a daemon thread that is inside one when the interpreter ends."""
    import ctypes  # only here: most programs end without such threads

    for charge in charges:
        # The store alone: a worker knows functions of its user's, whose modules are to end in order.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(charge.worker.store))


def _finalize_child() -> None:
    """In a child of multiprocessing see that the hook runs: before Python 3.13 `atexit` doesn't there."""
    global _finalized_in  # noqa: PLW0603  # of this process
    process = sys.modules.get("multiprocessing.process")
    if process is None or process.parent_process() is None or _finalized_in == os.getpid():
        return
    from multiprocessing.util import Finalize  # it is there already: this is one of its children

    _finalized_in = os.getpid()
    Finalize(None, _at_exit, exitpriority=-100)  # after whatever the child's own code has set up


# -- signals -------------------------------------------------------------------------------------------------------

_handled: set[int] = set()


def install_signal_handlers() -> None:
    """Have SIGTERM and SIGHUP end the process in order, as `sys.exit` does: what was posted is written.

    To be called in the main thread. A handler that is set already is left alone. The exit code is 128 + the signal's
    number, as a shell reports it. Raises `Misuse` in another thread.
    """
    if threading.current_thread() is not threading.main_thread():
        raise Misuse("signal handlers can only be installed in the main thread: call it there, before anything else")
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # not every system has both
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _end)
            _handled.add(number)


def _end(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


def _ours() -> list[int]:
    return [number for number in _handled if signal.getsignal(number) is _end]


# -- fork ----------------------------------------------------------------------------------------------------------

# What else is to be done in a forked child, as a module and a function: who is kept from here never ends in order.
in_child: list[tuple[str, str]] = []


class _Fork:
    """All workers and errands kept between two turns while the process is forked."""

    def __init__(self) -> None:
        self._locked = False
        self._errands = errand.Pause()
        self._tokens: list[tuple[Worker, object]] = []
        self._quiet: set[int] = set()
        self._complete = False  # nobody else is in the middle of anything

    def hold(self) -> None:
        """Wait until nobody is in the middle of anything, for a moment. What is held is noted before it is taken."""
        self._errands.hold(_FORK_SECONDS)
        self._complete = self._errands.complete
        deadline = monotonic() + _FORK_SECONDS
        while True:
            for worker in self._others():
                token = object()
                self._tokens.append((worker, token))
                if worker.mailbox.hold(token, deadline - monotonic()):
                    self._quiet.add(id(worker))
                elif not worker.mailbox.taken_here:
                    self._complete = False
            # Only now, for a worker that ends needs it in its turn; with it nobody begins any more.
            self._locked = True
            _lock.acquire()
            if not self._others() or monotonic() >= deadline:
                self._complete = self._complete and not self._others()
                return
            self._locked = False
            _lock.release()

    def _others(self) -> set[Worker]:
        return set(_workers).difference(worker for worker, _ in self._tokens)

    def end(self) -> None:
        """Let everybody go on, in the parent."""
        for worker, token in self._tokens:
            worker.mailbox.give_back(token)
            if not worker.mailbox.dozing:  # who came for it meanwhile has called for its thread already
                worker.mailbox.ring()
        self._errands.end()
        if self._locked:
            with contextlib.suppress(RuntimeError):  # an interrupt came before it was had
                _lock.release()

    def end_in_child(self) -> None:
        """Give all of it up, in the child."""
        forked = Forked(
            "this handle belongs to the process this one was forked from", hint="Open the job anew in this process."
        )
        replies = self._errands.forsake(forked)
        for worker in list(_workers):
            replies += worker.forsake(forked, quiet=self._complete and id(worker) in self._quiet)
        abandon(replies, forked)


# By thread, for two may fork at once; and a signal handler may fork in the middle of another fork.
_forks: dict[int, list[_Fork]] = {}


def _before_fork() -> None:
    fork = _Fork()
    _forks.setdefault(threading.get_ident(), []).append(fork)
    fork.hold()  # a Ctrl-C from here on finds it noted, and all that it holds is given back


def _in_parent() -> None:
    mine = _forks.get(threading.get_ident())
    if mine:
        mine.pop().end()


def _in_child() -> None:
    global _lock, _exiting  # noqa: PLW0603  # another thread of the parent may have held it
    _lock = threading.RLock()
    _exiting = False
    if mine := _forks.get(threading.get_ident()):
        mine[-1].end_in_child()
    _forks.clear()
    starter.forget()
    _charges.clear()
    _workers.clear()
    for module, act in in_child:
        getattr(sys.modules[module], act)()


# Twice: a Ctrl-C at the very beginning of it, before it takes signals itself, ends only the first.
atexit.register(_at_exit)
atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)
