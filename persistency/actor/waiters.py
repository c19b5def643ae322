"""Waiters: requests for changes that aren't there yet, parked until a commit brings some.

Rules:
  1. A waiter is answered by the first commit that has a change for it, or with why there will be none; it stands in
     nobody's way meanwhile.
  2. Parking, answering and cancelling are one critical section.
  3. There are at most `limit` of them; one more is refused.

Doesn't know: where changes come from, turns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from persistency.actor.reply import Reply
from persistency.actor.settling import Answer, cancel, settle_all
from persistency.errors import Closed, Overloaded, StorageError
from persistency.storage.port import Failed, ListChanges


class Waiters:
    """The parked requests of one job. `waits_for_itself` says whether the calling thread has the turn that answers."""

    def __init__(self, limit: int, waits_for_itself: Callable[[], bool]) -> None:
        self.waits_for_itself = waits_for_itself
        self._limit = limit
        self._lock = threading.RLock()  # a signal handler may cancel too
        self._parked: dict[Reply[Any], ListChanges] = {}
        self._refusal: BaseException | None = None
        self.abandoned: BaseException | None = None

    def __bool__(self) -> bool:
        return bool(self._parked)

    def park(self, message: ListChanges, reply: Reply[Any]) -> BaseException | None:
        """Keep a request until there is an answer; return why not."""
        with self._lock:
            if self._refusal is not None:
                return self._refusal
            if len(self._parked) >= self._limit:
                return Overloaded(f"{self._limit} requests wait for changes already", hint="Cancel those given up.")
            if getattr(message.origin, "closed", False):
                return Closed("the job was closed through the handle that asked")
            self._parked[reply] = message
            reply._line = self
        if reply._unwanted:
            self.withdraw(reply)
        return None

    def answer(self, read: Callable[[ListChanges], Any], last_version: int, answers: list[Answer]) -> None:
        """Add the answers of those that have one by now; who asks for what is behind `last_version` has none."""
        with self._lock:
            waiting = [(reply, message) for reply, message in self._parked.items() if message.after < last_version]
        for reply, message in waiting:
            try:
                outcome = read(message)
            except StorageError as error:
                outcome = Failed(error)
            if not outcome:
                continue
            with self._lock:
                if reply in self._parked:  # else it was given up meanwhile
                    failed = type(outcome) is Failed
                    # In this order: who is taken out must be answered, whatever is thrown in here.
                    answers.append((reply, None, outcome.error) if failed else (reply, outcome, None))
                    self._parked.pop(reply, None)

    def refuse(self, error: BaseException, answers: list[Answer]) -> None:
        """Add what tells everybody that there will be no answer, to those that come later too."""
        with self._lock:
            self._refusal = error
            answers += [(reply, None, error) for reply in self._parked]
            self._parked = {}

    def forsake(self, error: BaseException) -> list[Reply[Any]]:
        """In a forked child: have nobody answered any more; return the replies that were parked."""
        self.abandoned = error
        return list(self._parked)

    def leave(self, origin: Any, error: BaseException) -> None:
        """Tell those who asked through one handle that it is closed."""
        with self._lock:
            left = [reply for reply, message in self._parked.items() if message.origin is origin]
            for reply in left:
                del self._parked[reply]
        settle_all([(reply, None, error) for reply in left])

    def withdraw(self, reply: Reply[Any]) -> bool:
        """Take a request out and settle it as cancelled; return whether it was there."""
        with self._lock:
            if self._parked.pop(reply, None) is None:
                return False
        cancel(reply)
        return True
