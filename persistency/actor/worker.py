"""The worker: the life of one job. It opens the store, runs turns, looks after the store, rests, and ends.

A job has a thread once there is something for one: until then it *naps*, with its store open, and whoever asks is
answered in his own thread. A job at rest has neither; the next post gets it both. When the interpreter exits, posters
serve themselves.

Rules:
  1. Every reply that was taken is settled, whatever happens, to the thread too.
  2. Wherever an interrupt comes while it is begun, somebody is there to end it: a thread, whoever calls for one, or
     whoever closes it.

Doesn't know: SQL, keys, files, which engine the store is, how many workers there may be, who starts threads.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

from persistency.actor.loops import running_loop
from persistency.actor.reply import Reply
from persistency.actor.serving import Serving
from persistency.actor.settling import Answer, pending, ready, settle_all
from persistency.errors import Closed, PersistencyError


class GivenUp(Exception):
    """Whoever was opening the store was interrupted: somebody else may open it."""


class Worker(Serving):
    """One job's worker: a daemon thread, and without one whoever comes.

    `open_store` is called in a turn; `clock` stamps each group; `name_ops` turns a message back into operations;
    `waiters_max` bounds the requests that wait for changes; without a `slot` it never rests.
    """

    unborn: bool = True  # nobody has begun it
    _begun = False  # the thread that was started last is there
    _starting: threading.Lock
    _call: Callable[[Worker], None]
    _called = False

    # -- its beginning -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread; `opened` is settled when the store is open, or with why it isn't."""
        self._begun, self._starting = False, threading.Lock()
        thread = threading.Thread(target=self._run, name=f"persistency:{self._job_id}", daemon=True)
        try:
            self.unborn = False
            self.mailbox.leave_to_thread()
            thread.start()
        except BaseException as error:
            with self._starting:
                begun = self._begun
                self._over = not begun
            if begun:  # an interrupt, and the thread lives: whoever has called closes what it opens
                raise
            if self.store is None:
                self.could_not_start(error)
                return
            self.start_unattended()
            if not isinstance(error, Exception):
                raise

    def start_here(self, call: Callable[[Worker], None]) -> None:
        """Open the store in this thread, and nap; `call` has whoever starts threads tell it to `come`.

        It is called under the mailbox's lock, by whoever rings, and raises `RuntimeError` if no thread can be had. An
        interrupt that comes meanwhile is raised, and who waits for the opening is told that it was given up.
        """
        token, answers = object(), list[Answer]()
        self._call = call
        try:
            self.mailbox.unattend(self._serve_late)  # until it naps: whoever closes it serves it
            self.unborn = False
            if self.mailbox.hold(token):
                self._open(answers)
            else:  # a fork keeps it just now
                self.start()
            self._settle_down(token, answers)
        except BaseException:
            # Only what is still to be done: each of these knows whether it was.
            if self.store is None and not self.opened.done() and self._has(token):
                self._not_opened(self._given_up(), answers)
            self._settle_down(token, answers)
            raise

    def _given_up(self) -> GivenUp:
        return GivenUp(f"the opening of job {self._job_id!r} was interrupted")

    def _has(self, token: object) -> bool:
        return self.mailbox.is_held_by(token) or self.mailbox.hold(token)

    def _open(self, answers: list[Answer]) -> None:
        try:
            self.activation.begin()
        except Exception as error:
            self._not_opened(error, answers)
        if self.mailbox.abandoned is not None:  # somebody forked in the middle of it, and this is the child
            store, self.turns.store, self.activation.upkeep = self.store, None, None
            if store is not None:
                store.disown(quiet=True)
            raise self.mailbox.abandoned

    def _settle_down(self, token: object, answers: list[Answer]) -> None:
        """Give the turn back, and have somebody to look after the store, before anybody knows that it is open."""
        self.mailbox.give_back(token)
        self._debts.pay(answers)
        if self.store is None and not self._ended:  # its thread opens it
            return
        if not (self._over or self._begun or self.mailbox.napping):
            if self.activation.pause() is not None:
                self.start()
            elif not self.mailbox.nap(self._wake) or self._over:
                self._serve_late()
        settle_all([(self.opened, None, None)])

    def _wake(self) -> None:
        """Call for a thread. The mailbox's lock is held, and the caller may be in the middle of anything."""
        if self._called:
            return
        try:
            self._call(self)
            self._called = True
        except (RuntimeError, MemoryError):
            self._over = True
            self.mailbox.wake_up()
            self.mailbox.unattend(self._serve_late)

    def come(self, begin: Callable[[Worker], None]) -> None:
        """End the nap with `begin`; nothing happens if it is over already."""
        if self.mailbox.wake_up():
            try:
                begin(self)
            except BaseException:  # thrown into whoever starts threads: nobody else would come
                if not (self._begun or self._over):
                    self.start_unattended()
                raise

    def doze(self) -> None:
        """Wait for the first post, or a ring, before the store is opened. Instead of `start`, where there is a slot."""
        self._resting, self.unborn = True, False
        self._lie_down()

    def start_unattended(self) -> None:
        """Open the store in this thread and serve every poster in its own; for when no thread can be started."""
        self._resting, self._over = False, True
        self.mailbox.unattend(self._serve_late)
        self.unborn = False
        self._serve_late()

    # -- its end -------------------------------------------------------------------------------------------------

    def close(self, *, drain: bool = True) -> Reply[None]:
        """Refuse further posts, run what waits (or fail it with `Closed`), close the store; `closed` tells."""
        if not drain:
            self.turns.discard()
        closed = Closed(f"job {self._job_id!r} is closed")
        try:
            if self.unborn:  # and nobody will
                settle_all([(self.opened, None, self._given_up())])
            alone = self.unborn or self._is_left_alone()
            dozed = not (alone or self.mailbox.napping) and self._wakes_nobody()
            self.mailbox.close(lambda: closed)
            if alone:
                self._serve_alone()
            elif dozed and self.mailbox.ended:  # there is nothing to be opened for
                self._serve_late()
            elif dozed and self._slot is not None:
                self._slot.wake()
        except BaseException:  # an interrupt: who was woken from his doze for this has to come all the same
            self.mailbox.close(lambda: closed)
            if self._slot is not None:
                self._slot.wake()
            if self.unborn or not (self._slot is not None or self._begun or self.mailbox.napping):
                self._serve_alone()
            raise
        return self.closed

    def _is_left_alone(self) -> bool:
        """End the nap of a worker that has nothing to do; return whether it was that: whoever closes it serves it."""
        mailbox = self.mailbox
        # Under an event loop its thread does it: to close a file may take a while.
        return mailbox.napping and mailbox.idle and not mailbox.taken and running_loop() is None and mailbox.wake_up()

    def _serve_alone(self) -> None:
        """Serve a worker that has nobody, or have whoever has the turn now do it afterwards."""
        self.mailbox.unattend(self._serve_late)
        self.serve()

    @property
    def naps_alone(self) -> bool:
        """Whether it naps and no thread was called for: whoever retires it tidies its store up himself."""
        return self.mailbox.napping and not self._called

    def retire(self, patience: float | None = None) -> Reply[None]:
        """Run what waits, tidy the store up and end the thread, but stay open: later posters serve themselves.

        What another process has locked is waited for no longer than `patience` seconds (`None`: as long as ever).
        """
        self._patience = patience
        # Who was called for writes what waits: that may take any time, and whoever ends the interpreter has little.
        comes = self._called and self.mailbox.napping
        napped = self.naps_alone and self.mailbox.wake_up()
        if not (comes or napped) and self._wakes_nobody():
            self.start_unattended()
        elif self._retired is None:
            self._retired = pending(self.mailbox, reads=False)
            self.mailbox.ring()
            if napped:
                self.mailbox.unattend(self._serve_late)
                self._serve_late()
        if self._retired is not None and not self._over:
            return self._retired
        self._serve_late()  # without a thread already: whoever asks does it
        return ready()

    def _wakes_nobody(self) -> bool:
        """End the rest of a worker without a thread; return whether it was resting."""
        return self.mailbox.wake_up() or (self._slot is not None and self._slot.withdraw())

    def forsake(self, error: PersistencyError, *, quiet: bool) -> list[Reply[Any]]:
        """In a forked child: leave the parent's store alone from now on; return the replies nobody will answer.

        `quiet` says that nobody was in the middle of a turn.
        """
        replies = [*self.mailbox.forsake(error), *self.waiters.forsake(error), self.opened, self.closed]
        replies += self._debts.replies()
        store, self.turns.store, self.activation.upkeep = self.store, None, None
        self._over = self._ended = True
        if store is not None:
            store.disown(quiet=quiet)
        return replies if self._retired is None else [*replies, self._retired]

    # -- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        dozes = self.mailbox.dozes
        try:
            with self._starting:
                if self._over:  # whoever has started this thread was interrupted, and has given up
                    return
                self._begun = True
            self.mailbox.attend()
            self._resting = False
            self._live()
        finally:
            try:
                self._leave(sys.exception())
            except BaseException as error:  # thrown into this thread; nobody else would do it
                if self.mailbox.dozes == dozes:
                    self._leave(error)
                raise

    def _leave(self, cause: BaseException | None) -> None:
        if not (self._over or (self._resting and self.opened.done())):
            self._die(cause or SystemExit())
        self.mailbox.leave()
        if self._resting and self._slot is not None:
            self._slot.give_back()
            self._lie_down()

    def _live(self) -> None:
        self.serve()
        while not (self._over or self._resting):
            try:
                if self._slot is not None and self.turns.poisoned and self.store is not None:
                    self._in_turn(lambda _answers: self.activation.end(tidy=False))  # for those who wait for a slot
                self.mailbox.wait(self.activation.pause())
                self.serve()
            except BaseException as error:  # thrown into this thread from outside
                self._fail_all(error)

    def _die(self, cause: BaseException) -> None:
        """See that nobody waits for a thread that ends out of turn; who closes the job serves himself."""
        self._fail_all(cause)
        self._over, self._resting = True, False
        self.mailbox.unattend(self._serve_late)
        self._serve_late()  # which gives the slot back

    def _fail_all(self, cause: BaseException) -> None:
        self._fail(cause, answers := list[Answer]())
        settle_all(answers)

    def could_not_start(self, error: BaseException) -> None:
        """Tell that nobody could start the worker: what was posted meanwhile fails."""
        self._over = self._resting = False
        if self.mailbox.hold(token := object()):
            self.mailbox.take()
        self._not_opened(error, answers := list[Answer]())
        self.mailbox.give_back(token)
        settle_all(answers)
        if self._resting:
            self._lie_down()

    def _lie_down(self) -> None:
        """Doze until somebody posts; or end, if nobody will."""
        assert self._slot is not None
        if not self.mailbox.doze(self._slot.wake):
            self._resting = False
            self._serve_late()
        elif self._retired is not None and self._wakes_nobody():  # the interpreter ends
            self.start_unattended()
