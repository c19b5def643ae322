"""The mailbox: a bounded first-in-first-out line of messages, many posters, one taker at a time.

Messages wait in one flat list, three places each (the group layout of `storage.port`), so that a queued put costs
three pointers. Whoever holds the *turn* takes the whole list as one group: normally the worker; but a caller whose
request finds the list empty and the turn free takes the turn and is answered in place, without a hop to another
thread and back.

Rules:
  1. Posting, taking, turns and closing are one critical section: nothing slips in behind a closing. It is
     re-entrant, because signal handlers and `__del__` post too; such a post is taken over the bound, not made to wait.
  2. A message is wholly taken or refused; one larger than the bounds is taken whole by an empty mailbox.
  3. Where it is full a plain thread waits, first come first served; a thread that runs an event loop never does: it
     may go over the bounds by as much again, and is then refused.
  4. Nobody sleeps while there is something to do; the bell is rung only where the worker is asleep.
  5. The turn's holder is a token of the one call that took it, so that an interrupted call gives it back.

Doesn't know: what a message means, the store, files.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from threading import get_ident
from typing import Any

from persistency.actor.bounds import Bounds, Level, Poster, Refusal
from persistency.actor.reply import FINISHED, Reply, running_loop
from persistency.actor.settling import cancel, pending, ready, settle_all
from persistency.errors import Overloaded, StorageError
from persistency.storage.port import GetRow, Group

_new_reply = Reply.__new__


class Mailbox:
    """The line in front of one job's worker."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        # Set by the worker while it can be asked in place; run by whoever has the turn.
        self.get_in_place: Callable[[bytes, bytes], bytes | None] | None = None
        self.read_in_place: Callable[[Any], Reply[Any]] | None = None
        self.write_in_place: Callable[[Any, int], Reply[Any]] | None = None
        # Threads that must never wait for room here: the worker, and whoever runs callbacks for it.
        self.never_waits: set[int] = set()
        self.worker_thread: int | None = None
        self._lock = threading.RLock()
        # Guarded by the lock: the line and its level,
        self._messages: Group = []
        self._ops = 0
        self._bytes = 0
        self._requests = 0
        self._in_flight = 0
        self._open_ops = bounds.ops_max  # what a plain put may go up to; 0 where it has to look closer
        self._bytes_max = bounds.bytes_max
        self._inline = bounds.inline
        self._refusal: Refusal | None = None
        self._closed = False
        # the turn, the sleeper,
        self._holder: object | None = None
        self._holder_thread = 0
        self._asleep = False
        self._rung = False
        self._late = 0  # posters that wait for the turn, once they have to serve themselves
        self._turn_free = threading.Condition(self._lock)
        self._attendant: Callable[[], None] | None = None
        # and those who wait for room.
        self._posters: deque[Poster] = deque()
        self._draining: list[Reply[None]] = []
        self._bell = threading.Lock()
        self._bell.acquire()

    def put(self, category: bytes, key: bytes, payload: bytes, nbytes: int) -> None:
        """Post a plain put. Raises `Overloaded` where it is full, or whatever the mailbox was closed with."""
        with self._lock:
            if self._ops < self._open_ops and (total := self._bytes + nbytes) <= self._bytes_max:
                self._ops += 1
                self._bytes = total
                self._messages += (category, key, payload)
                if self._asleep:
                    self._ring()
                return
        self._post((category, key, payload), 1, nbytes, 0)

    def tell(self, message: Any, ops: int, nbytes: int) -> None:
        """Post any other event."""
        self._post((None, message, None), ops, nbytes, 0)

    def check(self) -> None:
        """Raise what the mailbox was closed with, if it was."""
        if self._refusal is not None:
            raise self._refusal()

    def ask(self, message: Any, *, reads: bool, ops: int = 0, nbytes: int = 0, free: bool = False) -> Reply[Any]:
        """Post a request and return its reply; a `free` one needs no room."""
        reply = pending(self, reads=reads)
        self._post((None, message, reply), ops, nbytes, 0 if free else 1)
        return reply

    def get(self, category: bytes, key: bytes) -> Reply[bytes | None]:
        """Answer a point read: in place if nothing is waiting and the turn is free, else through the line."""
        if not self._messages and (self._inline or running_loop() is None):
            reply = _new_reply(Reply)
            try:
                with self._lock:
                    get = self.get_in_place
                    if self._holder is None and get is not None and not self._messages:
                        self._holder_thread = get_ident()
                        self._holder = reply
                if self._holder is reply and get is not None:
                    # As `ready` does; a call would cost a tenth of the whole read.
                    reply._result = get(category, key)
                    reply._state = FINISHED
                    return reply
            except StorageError as error:
                return ready(error=error)
            finally:
                if self._holder is reply:
                    self._holder = None
                    if self._messages or self._closed or self._late:
                        self._hand_over()
        return self.ask(GetRow(category, key), reads=True)

    def read(self, message: Any, *, point: bool = False) -> Reply[Any]:
        """Answer a read: in place where `get` would be; under an event loop only if it is a `point` read."""
        reply = None
        if not self._messages and ((point and self._inline) or running_loop() is None):
            reply = self._in_place(self.read_in_place, message)
        return reply or self.ask(message, reads=True)

    def write(self, message: Any, ops: int, nbytes: int, *, free: bool = False) -> Reply[Any]:
        """Answer a request that writes, or a barrier: in place for a plain thread that finds the job idle."""
        reply = None
        if not self._messages and running_loop() is None:
            reply = self._in_place(self.write_in_place, message, ops)
        return reply or self.ask(message, reads=False, ops=ops, nbytes=nbytes, free=free)

    def _in_place(self, serve: Callable[..., Reply[Any]] | None, *args: Any) -> Reply[Any] | None:
        token = object()
        try:
            if serve is not None and self._take_turn(token):
                return serve(*args)
        except StorageError:
            pass  # Nothing was applied. The worker knows how to wait until it can be.
        finally:
            self.give_back(token)
        return None

    def _take_turn(self, token: object) -> bool:
        with self._lock:
            return not self._messages and self._refusal is None and self.hold(token)

    def hold(self, token: object) -> bool:
        """Take the turn alone, if nobody has it."""
        with self._lock:
            if self._holder is not None:
                return False
            self._holder_thread = get_ident()
            self._holder = token
            return True

    def give_back(self, token: object) -> None:
        """Give the turn back, if this token has it, and see that what was posted meanwhile is looked after."""
        if self._holder is token:
            self._holder = None
            if self._messages or self._closed or self._late:
                self._hand_over()

    def _hand_over(self) -> None:
        self.ring()
        with self._lock:
            if self._late:
                self._turn_free.notify_all()
                return
        if self._attendant is not None:
            self._attendant()

    def wait(self) -> None:
        """Sleep until there is something to take, or somebody rings."""
        with self._lock:
            if self._rung or ((self._messages or self._closed) and self._holder is None):
                self._rung = False
                return
            self._asleep = True
        self._bell.acquire()

    def ring(self) -> None:
        """Wake the worker for something other than messages; if it is awake, don't let it fall asleep."""
        with self._lock:
            if self._asleep:
                self._ring()
            else:
                self._rung = True

    def take(self, token: object, *, patience: float = 0.0) -> Group | None:
        """Take the turn and the whole line, empty or not; `None` if another keeps the turn for `patience` seconds."""
        me = get_ident()
        with self._lock:
            if self._holder is not None and patience and self._holder_thread != me:
                self._late += 1
                try:
                    self._turn_free.wait_for(lambda: self._holder is None, patience)
                finally:
                    self._late -= 1
            return self.take_more() if self.hold(token) else None

    def take_more(self) -> Group:
        """Take the whole line, for who has the turn already."""
        with self._lock:
            group, self._messages = self._messages, []
            self._in_flight += self._ops
            self._ops = self._bytes = self._requests = 0
            self._admit()
            drained, self._draining = self._draining, []
        if drained:
            settle_all((reply, None, None) for reply in drained)
        return group

    def decided(self, account: Callable[[], None]) -> None:
        """Run `account` and forget what was in flight, as one step for whoever looks at the level."""
        with self._lock:
            self._in_flight = 0
            account()

    def close(self, refusal: Refusal) -> None:
        """Refuse every later post; what is in the line stays to be taken. The first refusal stays."""
        with self._lock:
            self._closed = True
            drained = self._refuse(refusal) if self._refusal is None else []
            self.ring()
        settle_all((reply, None, refusal()) for reply in drained)
        if self._attendant is not None:
            self._attendant()

    def shut(self, refusal: Refusal) -> Group:
        """Refuse every later post and take the whole line out; return it."""
        with self._lock:
            drained = self._refuse(refusal)
            group, self._messages = self._messages, []
            self._in_flight += self._ops
            self._ops = self._bytes = self._requests = 0
            self.ring()
        settle_all((reply, None, refusal()) for reply in drained)
        return group

    def unattend(self, attendant: Callable[[], None]) -> None:
        """From now on whoever posts calls `attendant` afterwards; the worker sleeps no more."""
        with self._lock:
            self._attendant = attendant
            self._open_ops = 0

    @property
    def ended(self) -> bool:
        """Whether nothing will ever be taken any more."""
        with self._lock:
            return self._closed and not self._messages

    @property
    def empty(self) -> bool:
        """Whether nothing waits."""
        return not self._messages

    def look_at_level(self, look: Callable[[Level], Any]) -> Any:
        """Return what `look` makes of how much is waiting, while nothing can change."""
        with self._lock:
            return look(self._level())

    def drain(self) -> Reply[None]:
        """Return a reply that is settled when the line is below its low-water mark: half of the bounds."""
        with self._lock:
            self.check()
            if self.bounds.low(self._level()):
                return ready()
            reply = pending(self, reads=False)
            self._draining.append(reply)
            return reply

    def withdraw(self, reply: Reply[Any]) -> bool:
        """Take a request out of the line and settle it as cancelled; return whether it was still there."""
        with self._lock:
            if reply not in self._messages[2::3]:
                return False
            at = self._messages[2::3].index(reply) * 3
            del self._messages[at : at + 3]
            self._requests -= 1
            self._admit()
        cancel(reply)
        return True

    def waits_for_itself(self) -> bool:
        """Say whether the calling thread is the one that would have to answer."""
        me = get_ident()
        with self._lock:
            return me == self.worker_thread or (self._holder is not None and me == self._holder_thread)

    def _post(self, places: tuple[Any, Any, Any], ops: int, nbytes: int, requests: int) -> None:
        """Post a message, wait for room, or raise."""
        # Owned already: a signal handler or `__del__` in the middle of another post of this thread.
        nested: bool = self._lock._is_owned()  # type: ignore[attr-defined]  # what threading.Condition relies on
        poster = None
        with self._lock:
            self.check()
            if nested or not (ops or requests) or self._may_enter(ops, nbytes, requests):
                self._append(places, ops, nbytes, requests)
            else:
                poster = Poster(places, ops, nbytes, requests)
                self._posters.append(poster)
                self._open_ops = 0
        if poster is not None:
            self._wait_for_room(poster)
        if self._attendant is not None and not nested:
            self._attendant()

    def _may_enter(self, ops: int, nbytes: int, requests: int) -> bool:
        """Say whether a post is taken now; raise `Overloaded` if it may neither be taken nor wait for room."""
        ahead = any(bool(waiting.ops) == bool(ops) for waiting in self._posters)  # who came before, and of this kind
        if not ahead and self.bounds.fit(self._level(), ops, nbytes, requests, 1):
            return True
        me = get_ident()
        if me in self.never_waits or (self._holder is not None and me == self._holder_thread):
            return True
        if any(waiting.thread == me for waiting in self._posters):
            return True  # a signal handler while this very thread waits for room
        if running_loop() is not None:
            if self.bounds.fit(self._level(), ops, nbytes, requests, 2):
                return True
            raise self._overloaded("and this thread runs an event loop, which must not wait")
        if self.bounds.on_full == "raise":
            raise self._overloaded("and the job was opened with on_full='raise'")
        return False

    def _level(self) -> Level:
        return Level(self._ops, self._bytes, self._requests, self._in_flight)

    def _overloaded(self, why: str) -> Overloaded:
        waiting = f"{self._ops} operations, {self._bytes} bytes, {self._requests} requests waiting"
        return Overloaded(f"the mailbox is full ({waiting}), {why}")

    def _wait_for_room(self, poster: Poster) -> None:
        timeout = self.bounds.full_timeout
        try:
            rung = poster.bell.acquire(timeout=-1 if timeout is None else timeout)
        except BaseException:
            self._leave(poster)
            raise
        if not rung and self._leave(poster):
            raise self._overloaded(f"and there was no room within {timeout} s")
        if poster.refused is not None:
            raise poster.refused

    def _leave(self, poster: Poster) -> bool:
        """Stop waiting for room; return whether that came before being let in, or refused."""
        with self._lock:
            if poster not in self._posters:
                return False
            self._posters.remove(poster)
            self._admit()
            return True

    def _append(self, places: tuple[Any, Any, Any], ops: int, nbytes: int, requests: int) -> None:
        self._ops += ops
        self._bytes += nbytes
        self._requests += requests
        self._messages += places
        if self._asleep:
            self._ring()

    def _admit(self) -> None:
        """Let those in who wait for room, in their order; reads don't wait behind writes, nor writes behind reads."""
        stuck: set[bool] = set()
        waiting, self._posters = self._posters, deque()
        for poster in waiting:
            kind = bool(poster.ops)
            if kind in stuck or not self.bounds.fit(self._level(), poster.ops, poster.nbytes, poster.requests, 1):
                stuck.add(kind)
                self._posters.append(poster)
            else:
                self._append(poster.places, poster.ops, poster.nbytes, poster.requests)
                poster.bell.release()
        if self._refusal is None and self._attendant is None and not self._posters:
            self._open_ops = self.bounds.ops_max

    def _refuse(self, refusal: Refusal) -> list[Reply[None]]:
        self._refusal = refusal
        self._open_ops = 0
        self.get_in_place = self.read_in_place = self.write_in_place = None
        for poster in self._posters:
            poster.refused = refusal()
            poster.bell.release()
        self._posters.clear()
        drained, self._draining = self._draining, []
        return drained

    def _ring(self) -> None:
        self._asleep = False
        self._bell.release()
