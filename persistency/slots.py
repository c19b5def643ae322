"""Slots: how many workers may be live at once, who has to rest for whom, and who wakes them again.

A job that nobody uses rests: it has no thread, no connection and no lock on its file. Its next post wakes it. Where
there is a limit and it is reached, the one that was used the longest ago, of those that are idle, rests for it.

Rules:
  1. First come, first served; a wait that is given up leaves nothing behind.
  2. Workers are started by a thread of their own here: posters only leave a note, whatever they are in the middle of.
  3. The lock guards the tables only; nothing is waited for, opened or closed under it.

Doesn't know: jobs' ids and files, what a worker does.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from queue import Empty, SimpleQueue
from time import monotonic

from persistency import lifecycle
from persistency.actor.mailbox import Mailbox
from persistency.actor.worker import Worker
from persistency.logfields import about

log: logging.Logger = logging.getLogger("persistency")

LOOK_SECONDS = 1.0  # while somebody waits: a job can become idle without anybody noticing


class Slots:
    """The slots of one `Persistency`. `live_max` and `idle_ttl` (seconds) may be `None`: without a limit."""

    def __init__(self, live_max: int | None, idle_ttl: float | None, open_timeout: float | None) -> None:
        self.live_max = live_max
        self.idle_ttl = idle_ttl
        self._open_timeout = open_timeout
        self._lock = threading.RLock()
        # Guarded by the lock:
        self._places: set[Place] = set()  # of all jobs that are open, resting or not
        self._live: set[Place] = set()
        self._asked: set[Place] = set()  # to rest; a part of those that are live
        self._waiting: dict[Place, float] = {}  # until when, in the order they came
        self._opener: threading.Thread | None = None
        # Not guarded, for those who may be in the middle of anything:
        self._woken: deque[Place] = deque()
        self._bells: SimpleQueue[None] = SimpleQueue()

    def place(self, mailbox: Mailbox) -> Place:
        """Return a place for one more job."""
        place = Place(self, mailbox)
        with self._lock:
            self._places.add(place)
            if self._opener is None:
                opener = threading.Thread(target=self._open, name="persistency:opener", daemon=True)
                with contextlib.suppress(RuntimeError):  # out of threads, or the interpreter exits: see `served`
                    opener.start()
                    self._opener = opener
        return place

    def remove(self, place: Place) -> None:
        """Forget a job that is closed."""
        with self._lock:
            self._places.discard(place)
        self.give_back(place)
        self._bells.put(None)

    # -- called by workers and posters ---------------------------------------------------------------------------

    def wake(self, place: Place) -> None:
        """Have a worker started as soon as there is a slot for it."""
        self._woken.append(place)
        self._bells.put(None)

    def pressed(self) -> bool:
        """Say whether somebody waits for whom nobody was asked to rest yet."""
        return self._missing() > 0

    def _missing(self) -> int:
        """Return how many more have to rest."""
        if self.live_max is None:
            return 0
        return len(self._waiting) - max(0, self.live_max - len(self._live)) - len(self._asked)

    def wanted(self, place: Place) -> bool:
        """Say whether an idle worker has to rest."""
        if self.pressed():
            self._ask(place)
        with self._lock:
            if not self._waiting:  # they have given up
                self._asked.clear()
            return place in self._asked

    def decline(self, place: Place) -> None:
        """Note that a worker that was asked to rest has work again."""
        with self._lock:
            self._asked.discard(place)
        self._ask()

    def give_back(self, place: Place) -> None:
        """Note that a worker isn't live any more."""
        with self._lock:
            self._live.discard(place)
            self._asked.discard(place)
        self._bells.put(None)

    def withdraw(self, place: Place) -> bool:
        """Stop waiting for a slot; return whether that was so."""
        with self._lock:
            waited = self._waiting.pop(place, None) is not None
            with contextlib.suppress(ValueError):
                self._woken.remove(place)
                waited = True
            return waited

    # -- the opener ----------------------------------------------------------------------------------------------

    def _open(self) -> None:
        while True:
            try:
                with contextlib.suppress(Empty):
                    self._bells.get(timeout=LOOK_SECONDS if self._waiting else None)
                with self._lock:
                    if not self._places and not self._woken:
                        self._opener = None
                        return
                self._look_round()
            except BaseException as error:  # whatever is thrown in here, everybody else waits for this thread
                log.exception("a job couldn't be woken", extra=about("wake_failed", None, error))

    def _look_round(self) -> None:
        self._line_up()
        for place in self._granted():
            try:
                lifecycle.begin(place.worker)
            except BaseException:  # else nobody could ever wake it again
                self.give_back(place)
                raise
        self._give_up()
        self._ask()

    def _line_up(self) -> None:
        with self._lock:
            while self._woken:
                until = float("inf") if self._open_timeout is None else monotonic() + self._open_timeout
                if (place := self._woken.popleft()) not in self._live:
                    self._waiting[place] = until

    def _granted(self) -> list[Place]:
        with self._lock:
            room = len(self._waiting) if self.live_max is None else self.live_max - len(self._live)
            granted = list(self._waiting)[: max(0, room)]
            for place in granted:
                del self._waiting[place]
                self._live.add(place)
            return granted

    def _give_up(self) -> None:
        now = monotonic()
        with self._lock:
            late = [place for place, until in self._waiting.items() if until <= now and place.worker.opened.done()]
            for place in late:
                del self._waiting[place]
        for place in late:  # not in this thread: callbacks may be called, and everybody else waits for it
            error = TimeoutError(self.busy())
            telling = threading.Thread(target=place.worker.could_not_start, args=(error,), daemon=True)
            telling.name = "persistency:late"
            try:
                telling.start()
            except RuntimeError:  # out of threads
                place.worker.could_not_start(error)

    def busy(self) -> str:
        """Say why there is no slot."""
        busy = f"all {self.live_max} jobs that may be live had work for {self._open_timeout} s"
        return f"{busy}: raise max_live_jobs or open_timeout, or close jobs"

    def _ask(self, asking: Place | None = None) -> None:
        """Ask as many to rest as are missing, those first that were used the longest ago; one is `asking` itself."""
        if not self.pressed():
            return
        with self._lock:
            idle = [place for place in self._live - self._asked if place.worker.looks_idle]
            idle.sort(key=lambda place: place.worker.turns.used_at)
            asked = [place for place in idle if place is asking or not place.mailbox.taken][: max(0, self._missing())]
            self._asked.update(asked)
            # One that a caller runs in place can't be asked; it is only made to look, when the caller is through.
            rung = [place for place in idle if place not in self._asked][: max(0, self._missing())]
        for place in (*asked, *rung):
            place.mailbox.ring()


class Place:
    """One job's slot; see `persistency.actor.slot`."""

    worker: Worker  # set by whoever makes it, before anything is called

    def __init__(self, slots: Slots, mailbox: Mailbox) -> None:
        self.mailbox = mailbox
        self._slots = slots

    @property
    def idle_ttl(self) -> float | None:
        """After how many seconds without use the worker rests; not where nobody could wake it again."""
        return self._slots.idle_ttl if self.served else None

    def pressed(self) -> bool:
        """Say whether somebody waits for whom nobody was asked to rest yet."""
        return self._slots.pressed()

    def wanted(self) -> bool:
        """Say whether this worker, which could, has to rest for somebody else's sake."""
        return self.served and self._slots.wanted(self)

    def decline(self) -> None:
        """Note that there is work again."""
        if self in self._slots._asked:
            self._slots.decline(self)

    def give_back(self) -> None:
        """Note that the worker isn't live any more."""
        self._slots.give_back(self)

    def withdraw(self) -> bool:
        """Stop waiting for a slot; return whether that was so."""
        return self._slots.withdraw(self)

    def wake(self) -> None:
        """Have the worker started again as soon as there is a slot."""
        self._slots.wake(self)

    @property
    def served(self) -> bool:
        """Whether there is a thread that starts workers."""
        return self._slots._opener is not None

    def remove(self) -> None:
        """Forget the job: it is closed."""
        self._slots.remove(self)

    def explain(self) -> str | None:
        """Say why the worker isn't live, if it waits for a slot."""
        return self._slots.busy() if self in self._slots._waiting else None
