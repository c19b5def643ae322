"""The mailbox: a bounded first-in-first-out line of messages, many posters, one taker at a time.

Messages wait in one flat list, three places each (the group layout of `storage.port`). Whoever holds the *turn* takes
the whole list as one group: normally the worker; but a caller whose request finds the list empty and the turn free
takes the turn and is answered in place, without a hop to another thread and back.

Rules:
  1. Posting, taking, turns and closing are one critical section: nothing slips in behind a closing. It is
     re-entrant, because signal handlers and `__del__` post too; such a post is taken over the bound, not made to wait.
  2. A message is wholly taken or refused; one larger than the bounds is taken whole by an empty mailbox.
  3. Where it is full a plain thread waits, first come first served; a thread that runs an event loop never does: it
     may go over the bounds by as much again, and is then refused.
  4. Until a ring was answered, nobody is answered in place.
  5. The turn's holder is a token of the one call that took it, so that an interrupted call gives it back.

Doesn't know: what a message means, the store, files.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Condition, get_ident
from typing import Any, TypeVar

from persistency.actor.bounds import Bounds, Level, Poster, Queue, overloaded, standing
from persistency.actor.door import Door, Refusal
from persistency.actor.loops import running_loop
from persistency.actor.reply import Answered, Reply
from persistency.actor.settling import cancel, pending, ready, settle_all
from persistency.errors import PersistencyError, StorageError
from persistency.storage.port import PLACES, GetRow, Group

T = TypeVar("T")

CROWD_OPS_MIN = 512  # fewer are written too soon for anything to be done beside it

_new_answered = Answered.__new__


class Mailbox(Door):
    """The line in front of one job's worker."""

    __slots__ = (
        "_bytes", "_bytes_max", "_drained", "_generation", "_inline", "_late", "_lone", "_low", "_messages", "_ops",
        "_queue", "_requests", "_taken", "_turn_free", "_withdrawn", "asked", "bounds", "in_hand",
    )  # fmt: skip

    def __init__(self, bounds: Bounds) -> None:
        super().__init__()
        self.bounds: Bounds = bounds
        # Guarded by the lock: the line,
        self._messages: Group = []
        self._ops = self._bytes = self._requests = 0
        self.asked: bool = False  # whether a request has waited in it; whoever wants to know sets it back
        self._taken = 0  # write operations, since the beginning
        self._generation = 0  # of the line: how often it was taken
        self._lone = False  # whether what was taken last came by itself
        self.in_hand: list[Group] = []  # what was taken and isn't accounted for yet
        self._withdrawn = 0  # requests cancelled where they stand, still to be cleared away
        self._open_ops = bounds.ops_max  # up to where a plain put needn't look closer
        self._bytes_max = bounds.bytes_max
        self._inline = bounds.inline
        # and who waits for the turn.
        self._late = 0  # posters that wait for the turn, once they have to serve themselves
        self._turn_free: Condition | None = None  # made by the first of them: hardly any job has one
        self._queue = Queue()
        self._drained: Reply[None] | None = None  # one for all who want to know
        self._low: list[Reply[None]] = []  # such ones, for whom it was low, and who aren't told yet

    def put(self, category: bytes | None, key: Any, payload: bytes | None, nbytes: int) -> None:
        """Post an event of one operation. Raises `Overloaded` where it is full, or what the mailbox was closed with."""
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

    def ask(self, message: Any, *, reads: bool, ops: int = 0, nbytes: int = 0, free: bool = False) -> Reply[Any]:
        """Post a request and return its reply; a `free` one needs no room."""
        self.check_outside()
        reply = pending(self, reads=reads)
        self._post((None, message, reply), ops, nbytes, 0 if free else 1)
        return reply

    def get(self, category: bytes, key: bytes) -> Reply[bytes | None]:
        """Answer a point read: in place if nothing is waiting and the turn is free, else through the line."""
        if self.get_in_place is not None and (self._inline or running_loop() is None):
            reply: Reply[bytes | None] = _new_answered(Answered)
            try:
                with self._lock:
                    get = self.get_in_place
                    if get is not None and self._holder is None and not (self._messages or self._rung or self._late):
                        self._holder_thread = get_ident()
                        self._holder = reply
                if self._holder is reply and get is not None:  # then as `ready` does, without a call
                    reply._result = get(category, key)
                    return reply
            except StorageError as error:
                return ready(error=error)
            finally:
                if self._holder is reply:
                    self._holder = None
                    if self._messages or self._rung or self._closed or self._late:
                        self._hand_over()
        message = GetRow(category, key)
        if self._lone and self.prefetch is not None and not self._messages:
            self._in_place("prefetch", message)  # in a crowd it would be thrown away: the group is more than this read
        return self.ask(message, reads=True)

    def read(self, message: Any, *, point: bool = False) -> Reply[Any]:
        """Answer a read: in place where `get` would be; under an event loop only if it is a `point` read."""
        reply = None
        if not self._messages and ((point and self._inline) or running_loop() is None):
            reply = self._in_place("read_in_place", message)
        return self.ask(message, reads=True) if reply is None else reply

    def write(self, message: Any, ops: int, nbytes: int, *, free: bool = False) -> Reply[Any]:
        """Answer a request that writes, or a barrier: in place for a plain thread that finds the job idle."""
        reply = None
        if not self._messages and running_loop() is None:
            reply = self._in_place("write_in_place", message, ops)
        return self.ask(message, reads=False, ops=ops, nbytes=nbytes, free=free) if reply is None else reply

    def _in_place(self, how: str, *args: Any) -> Reply[Any] | None:
        token = object()
        try:
            with self._lock:
                nobody = self._holder is None and not (self._messages or self._rung or self._late)
                if nobody and self._refusal is None:
                    self._holder_thread = get_ident()
                    self._holder = token
            if self._holder is token:
                # Looked up with the turn in hand: else the job might go to rest meanwhile.
                serve: Callable[..., Reply[Any]] | None = getattr(self, how)
                return None if serve is None else serve(*args)
        except StorageError:
            pass  # Nothing was applied. The worker knows how to wait until it can be.
        finally:
            # As `give_back` does: an interrupt that came at the entry of a call would keep the turn for ever.
            if self._holder is token:
                self._holder = None
                if self._messages or self._rung or self._closed or self._late:
                    self._hand_over()
        return None

    def hold(self, token: object, patience: float = 0.0) -> bool:
        """Take the turn alone, if nobody keeps it for `patience` seconds; who has some comes before who has none."""
        with self._lock:
            if self._holder is not None and patience > 0 and self._holder_thread != get_ident():
                free = self._turn_free = self._turn_free or Condition(self._lock)
                self._late += 1
                try:
                    free.wait_for(lambda: self._holder is None, patience)
                finally:
                    self._late -= 1
                    self.ring()  # who was kept from it meanwhile looks again
            elif self._late and patience <= 0:
                return False
            if self._holder is not None:
                return False
            self._holder_thread = get_ident()
            self._holder = token
            return True

    def is_held_by(self, token: object) -> bool:
        """Say whether this token has the turn."""
        return self._holder is token

    def give_back(self, token: object) -> None:
        """Give the turn back, if this token has it, and see that what was posted meanwhile is looked after."""
        if self._holder is token:
            self._holder = None
            if self._messages or self._rung or self._closed or self._late:
                self._hand_over()

    def _hand_over(self) -> None:
        self.ring()
        with self._lock:
            if self._late:
                if self._turn_free is not None:
                    self._turn_free.notify_all()
                return
        if self._attendant is not None:
            self._attendant()

    def _stirs(self) -> bool:
        return (self._rung or bool(self._messages) or self._closed) and self._holder is None and not self._late

    def _ends(self) -> bool:
        return self.ended

    @property
    def crowded(self) -> bool:
        """Whether so many operations wait that it is worth preparing for them."""
        return self._ops >= CROWD_OPS_MIN

    def take(self, *, answers_ring: bool = False) -> Group:
        """Take the whole line, for who has the turn; `answers_ring`: and will look after all there is."""
        with self._lock:
            self._rung = self._rung and not answers_ring
            group = self._take_line()
            self._admit()
            self._note_low()
        if self._low:
            self._tell_low()
        return group

    def forsake(self, error: PersistencyError) -> list[Reply[Any]]:
        """In a forked child: refuse everything; return the replies that wait here. Nobody else is here."""
        self._lock._at_fork_reinit()  # type: ignore[attr-defined]  # a thread that isn't here may have had it
        self.abandoned: PersistencyError | None = error
        self._refusal = lambda: error
        self.wake_up()
        self._open_ops = 0
        self._serve_nobody()
        lines, self._messages, self.in_hand = [*self.in_hand, self._messages], [], []
        places = [place for line in lines for place in zip(line[::PLACES], line[2::PLACES], strict=False)]
        replies = [reply for category, reply in places if category is None and reply is not None]
        return [*replies, *self._low] if self._drained is None else [*replies, *self._low, self._drained]

    def as_one(self, act: Callable[..., T], taken: int, *args: Any) -> T:
        """Return what `act` gives, as one step for who looks; `taken` operations never stood in line."""
        if self.abandoned is not None:
            raise self.abandoned
        with self._lock:
            self._taken += taken
            return act(*args)

    def close(self, refusal: Refusal) -> None:
        """Refuse every later post; what is in the line stays to be taken. The first refusal stays."""
        with self._lock:
            self._closed = True
            if self._refusal is None:
                self._refuse(refusal)
            self.ring()
        self._tell_low(refusal())
        if self._attendant is not None:
            self._attendant()

    def shut(self, refusal: Refusal) -> Group:
        """Refuse every later post and take the whole line out; return it."""
        with self._lock:
            self._refuse(refusal)
            group = self._take_line()
            self.ring()
        self._tell_low(refusal())
        return group

    def __len__(self) -> int:
        return len(self._messages) // 3

    @property
    def ended(self) -> bool:
        """Whether nothing will ever be taken any more."""
        return self._closed and not self._messages

    @property
    def idle(self) -> bool:
        """Whether nobody waits for whoever may have the turn."""
        return not (self._messages or self._rung or self._closed)

    def drain(self) -> Reply[None]:
        """Return a reply that is settled when the line is below its low-water mark: half of the bounds."""
        with self._lock:
            self.check()
            if self.bounds.low(self.level()):
                return ready()
            self._drained = pending(self, reads=False) if self._drained is None else self._drained
            return self._drained

    def withdraw(self, reply: Reply[Any]) -> bool:
        """Cancel a request that still stands in line; return whether it did."""
        with self._lock:
            if reply._ticket != self._generation:
                return False
            reply._ticket = -1
            self._requests -= 1
            self._withdrawn += 1
            if self._withdrawn * 6 > len(self._messages) + 1000:
                self._clear_away()
            self._admit()
            if self.bounds.low(self.level()):
                self._note_low()
        cancel(reply)
        self._tell_low()
        return True

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
                self._queue.join(poster)
                self._open_ops = 0
        if poster is not None:
            self._wait_for_room(poster)
        if self._attendant is not None and not nested:
            self._attendant()

    def _may_enter(self, ops: int, nbytes: int, requests: int) -> bool:
        """Say whether a post is taken now; raise `Overloaded` if it may neither be taken nor wait for room."""
        if not self._queue.ahead(ops) and self.bounds.fit(self.level(), ops, nbytes, requests, 1):
            return True
        me = get_ident()
        # Lastly: a signal handler while this very thread waits for room.
        if me in self.never_waits or (self._holder is not None and me == self._holder_thread) or self._queue.holds(me):
            return True
        if running_loop() is not None:
            if self.bounds.fit(self.level(), ops, nbytes, requests, 2):
                return True
            raise overloaded(self.level(), "and this thread runs an event loop, which must not wait")
        if self.bounds.on_full == "raise":
            raise overloaded(self.level(), "and the job was opened with on_full='raise'")
        return False

    def level(self) -> Level:
        """Return how much is waiting."""
        return Level(self._ops, self._bytes, self._requests, self._taken + self._ops)

    def _wait_for_room(self, poster: Poster) -> None:
        timeout = self.bounds.full_timeout
        try:
            poster.bell.acquire(timeout=-1 if timeout is None else timeout)
        finally:
            with self._lock:
                self._queue.leave(poster)
                self._admit()
        if poster.refused is not None:
            raise poster.refused
        if not poster.let_in:
            raise overloaded(self.level(), f"and there was no room within {timeout} s")

    def _append(self, places: tuple[Any, Any, Any], ops: int, nbytes: int, requests: int) -> None:
        if requests:
            places[2]._ticket, self.asked = self._generation, True
        self._ops += ops
        self._bytes += nbytes
        self._requests += requests
        self._messages += places
        if self._asleep:
            self._ring()

    def _take_line(self) -> Group:
        if self._withdrawn:
            self._clear_away()
        # No call in between: what is thrown into this thread comes with one, and the line would be in nobody's hand.
        group, self._messages = self._messages, []
        self.in_hand += [group] if group else []
        self._lone = len(group) <= PLACES
        self._generation += 1
        self._taken += self._ops
        self._ops = self._bytes = self._requests = 0
        return group

    def _clear_away(self) -> None:
        """Take out the requests that were withdrawn: all at once, for each alone would walk through the line."""
        self._messages = standing(self._messages)
        self._withdrawn = 0

    def _admit(self) -> None:
        if self._queue:
            self._queue.admit(
                lambda poster: self.bounds.fit(self.level(), poster.ops, poster.nbytes, poster.requests, 1),
                lambda poster: self._append(poster.places, poster.ops, poster.nbytes, poster.requests),
            )
        looked_at = self._attendant is None and self._ending is None and not self._naps
        if self._refusal is None and looked_at and not self._queue:
            self._open_ops = self.bounds.ops_max

    def _note_low(self) -> None:
        drained, self._drained = self._drained, None
        self._low += [] if drained is None else [drained]

    def _tell_low(self, error: PersistencyError | None = None) -> None:
        if self._low:
            settle_all([(drained, None, error) for drained in self._low])
            with self._lock:
                self._low = [drained for drained in self._low if not drained.done()]

    def _refuse(self, refusal: Refusal) -> None:
        self._refusal = refusal
        self._open_ops = 0
        self._serve_nobody()
        self._queue.refuse(refusal)
        self._note_low()
