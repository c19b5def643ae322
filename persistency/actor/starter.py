"""The starter: a thread that starts others, for those who mustn't: posters that may be in the middle of anything.

They leave a note; a thread that the system makes at once, and that ends with the last note, does what it says.

Rules:
  1. To leave a note never waits and calls no code of anybody's, so a signal handler or `__del__` may do it.
  2. A note is left first and a thread seen to afterwards: one that is there looks at all notes before it ends. One that
     is only on its way may never come, so until it is there everybody makes one of his own, or is told that he can't.

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
        self._lives = False  # set by the threads alone: one is there, and looks again after it has set this back

    def note(self, act: Callable[[], object]) -> None:
        """Have something done in another thread, soon. Raises `RuntimeError` or `MemoryError` if none can be had."""
        self._notes.put(act)
        if not self._lives:
            start_new_thread(self._run, ())

    def _run(self) -> None:
        self._lives = True
        while True:
            try:
                self._notes.get_nowait()()
            except Empty:
                self._lives = False
                # Several of them do no harm.
                if self._notes.empty():
                    return
                self._lives = True
            except BaseException as error:  # others wait for this thread
                log.exception("a job's thread couldn't be started", extra=about("start_failed", None, error))

    def forget(self) -> None:
        """In a forked child: what was noted is the parent's, and nobody is here who would look at it."""
        self._notes, self._lives = SimpleQueue(), False


starter: Starter = Starter()
