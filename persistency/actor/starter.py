"""The starter: a thread that starts others, for those who mustn't: posters that may be in the middle of anything.

They leave a note; a thread that the system makes at once, and that ends with the last note, does what it says.

Rules:
  1. To leave a note never waits and calls no code of anybody's, so a signal handler or `__del__` may do it.
  2. A note is left first and a thread seen to afterwards: with one there, or on its way, somebody looks at all notes.

Doesn't know: what is started.
"""

from __future__ import annotations

import logging
from _thread import start_new_thread
from collections.abc import Callable
from queue import Empty, SimpleQueue

from persistency.logfields import about

log: logging.Logger = logging.getLogger("persistency")


class Starter:
    """The notes, and who looks at them: `threading` itself would wait for its thread, and has locks of its own."""

    def __init__(self) -> None:
        self._notes: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._lives = False

    def note(self, act: Callable[[], object]) -> None:
        """Have something done in another thread, soon. Raises `RuntimeError` if there is none to be had."""
        self._notes.put(act)
        if not self._lives:
            self._lives = True
            try:
                start_new_thread(self._run, ())
            except RuntimeError:
                self._lives = False
                raise

    def _run(self) -> None:
        while True:
            try:
                self._notes.get_nowait()()
            except Empty:
                self._lives = False
                # Two of them, if somebody has just made another one, do no harm.
                if self._notes.empty():
                    return
                self._lives = True
            except BaseException as error:  # others wait for this thread
                log.exception("a job's thread couldn't be started", extra=about("start_failed", None, error))

    def forget(self) -> None:
        """In a forked child: what was noted is the parent's, and nobody is here who would look at it."""
        self._notes, self._lives = SimpleQueue(), False


starter: Starter = Starter()
