"""A queue's rows: what each of its verbs does to them, inside a transaction.

All are in one category. A message is in one state at a time; its state row says in which, and one index row where:

    ("body", id)         its value, written once
    ("state", id)        what else is known of it
    ("line", place, id)  it is ready; who takes takes the lowest place
    ("time", ms, id)     it is delayed until then, or taken with a lease until then
    ("dead", ms, id)     it is a dead letter since then
    ("head",)            the last number given, the counts, and before when nothing is due in "time"

Rules:
  1. Numbers (ids, places, tokens) come from one counter and are never given twice.
  2. Each taking has a token. Whoever acknowledges, retries or extends shows it: a token that isn't the present one,
     because the lease was over and the message was put in line again, changes nothing.
  3. What is due is put in line before anything is put, taken or counted, so many at a time: a message whose delay is
     over at the end of the line, one whose lease is over at its old place, or among the dead after its last attempt.
  4. Each verb reads and writes a few rows by their keys, however long the queue is.
  5. Those who wait are rung for inside the transaction: what they then ask the job for comes behind it.

Doesn't know: jobs, threads, values.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

from persistency import CBOR, Corrupt, KeyRange, Transaction, key
from persistency.recipes.waiting import Bell

_DUE_MAX = 64  # so many at a time are put in line
_TAKEN_BYTES_MAX = 16 * 1024 * 1024  # beyond this `take` gives no more of them at once
_HEAD = key("head")
_LINE = KeyRange.prefix(key("line"))
_TIME = KeyRange.prefix(key("time"))
_DEAD = KeyRange.prefix(key("dead"))
LEASE_OVER = "its lease was over"


class Kind(IntEnum):
    """The states of a message."""

    READY = 0
    DELAYED = 1
    TAKEN = 2
    DEAD = 3


class State(NamedTuple):
    """What is known of a message. `when_ms` is until when it is delayed or taken, or since when it is dead."""

    kind: int
    attempt: int
    place: int
    when_ms: int
    token: int
    put_ms: int
    error: str | None


class Stored(NamedTuple):
    """A message as it is stored."""

    id: int
    body: bytes
    state: State


class Terms(NamedTuple):
    """How often a message is tried, and how long it waits in between."""

    attempts_max: int
    backoff_ms: int
    backoff_max_ms: int

    def pause_ms(self, attempt: int) -> int:
        """Return how long a message waits after an attempt that failed: twice as long after each."""
        return min(self.backoff_max_ms, self.backoff_ms << min(attempt - 1, 62))


class _Head:
    """The one row that every verb reads. `wake_ms`: nothing is due before."""

    __slots__ = ("before", "counts", "last", "lined_up", "wake_before_ms", "wake_ms")

    def __init__(self, payload: bytes | None) -> None:
        self.before = payload
        self.lined_up = 0
        self.last = 0
        self.wake_ms: int | None = None
        self.counts = [0, 0, 0, 0]
        if payload is not None:
            try:
                self.last, self.wake_ms, *self.counts = CBOR.decode(payload)
                if len(self.counts) != len(Kind):
                    raise ValueError(self.counts)
            except (TypeError, ValueError) as error:
                raise Corrupt("a queue's category has rows that aren't a queue's", hint="Use another name.") from error
        self.wake_before_ms = self.wake_ms

    def encoded(self) -> bytes:
        return CBOR.encode([self.last, self.wake_ms, *self.counts])

    def next_number(self) -> int:
        self.last += 1
        return self.last


class Rows:
    """The rows of one queue. Its methods are run inside the job, but for `bell`, which is rung by them."""

    def __init__(self, category: str, terms: Terms, bell: Bell) -> None:
        self.category = category
        self.terms = terms
        self.bell = bell

    # -- verbs ---------------------------------------------------------------------------------------------------

    def put(self, tx: Transaction, bodies: list[bytes], delay_ms: int) -> list[int]:
        """Put messages at the end of the line, or have them wait first; return their ids."""
        head, now_ms = self._begin(tx)
        ids = []
        for body in bodies:
            id_ = head.next_number()
            tx.put(self.category, key("body", id_), body)
            state = State(Kind.READY, 0, id_, 0, 0, now_ms, None)
            if delay_ms:
                state = state._replace(kind=Kind.DELAYED, when_ms=now_ms + delay_ms)
            self._enter(tx, head, id_, state)
            ids.append(id_)
        self._end(tx, head)
        return ids

    def take(self, tx: Transaction, lease_ms: int, limit: int) -> tuple[list[Stored], int | None]:
        """Take messages off the line; return them, and in how many milliseconds more may be due (`None`: unknown)."""
        head, now_ms = self._begin(tx)
        taken: list[Stored] = []
        nbytes = 0
        for found in tx.keys(self.category, _LINE, limit=limit):
            id_ = found.parts[2]
            state = self._state(tx, id_)
            body = tx.get(self.category, key("body", id_))
            if state is None or body is None:
                raise Corrupt(f"message {id_} of queue {self.category!r} isn't whole")
            self._leave(tx, head, id_, state)
            state = state._replace(
                kind=Kind.TAKEN, attempt=state.attempt + 1, when_ms=now_ms + lease_ms, token=head.next_number()
            )
            self._enter(tx, head, id_, state)
            taken.append(Stored(id_, body, state))
            nbytes += len(body)
            if nbytes >= _TAKEN_BYTES_MAX:
                break
        self._end(tx, head)
        return taken, None if head.wake_ms is None else max(0, head.wake_ms - now_ms)

    def ack(self, tx: Transaction, id_: int, token: int) -> bool:
        """Delete a message that is done."""
        state = self._held(tx, id_, token)
        if state is None:
            return False
        self._delete(tx, id_, state)
        return True

    def retry(self, tx: Transaction, id_: int, token: int, delay_ms: int | None, error: str | None) -> bool:
        """Have a message tried again, after a pause; it is dead if that was its last attempt."""
        state = self._held(tx, id_, token)
        if state is None:
            return False
        if state.attempt >= self.terms.attempts_max:
            return self._move(tx, id_, state, self._died(tx.now_ms, state, error))
        if delay_ms is None:
            delay_ms = self.terms.pause_ms(state.attempt)
        kind = Kind.DELAYED if delay_ms else Kind.READY
        return self._move(tx, id_, state, state._replace(kind=kind, when_ms=tx.now_ms + delay_ms, place=0, error=error))

    def release(self, tx: Transaction, id_: int, token: int) -> bool:
        """Put a message back to where it was, as if it had not been taken."""
        state = self._held(tx, id_, token)
        return state is not None and self._move(
            tx, id_, state, state._replace(kind=Kind.READY, attempt=state.attempt - 1)
        )

    def bury(self, tx: Transaction, id_: int, token: int, error: str | None) -> bool:
        """Make a message a dead letter."""
        state = self._held(tx, id_, token)
        return state is not None and self._move(tx, id_, state, self._died(tx.now_ms, state, error))

    def extend(self, tx: Transaction, id_: int, token: int, lease_ms: int) -> int | None:
        """Let a lease end so long from now; return when that is, `None` if it is lost."""
        state = self._held(tx, id_, token)
        if state is None:
            return None
        until_ms = tx.now_ms + lease_ms
        self._move(tx, id_, state, state._replace(when_ms=until_ms))
        return until_ms

    def cancel(self, tx: Transaction, id_: int) -> bool:
        """Delete a message that nobody has and that is not dead."""
        state = self._state(tx, id_)
        if state is None or state.kind not in (Kind.READY, Kind.DELAYED):
            return False
        self._delete(tx, id_, state)
        return True

    def dead(self, tx: Transaction, limit: int) -> list[Stored]:
        """Return dead letters, the longest dead first."""
        found = []
        for id_ in self._ids(tx, _DEAD, limit):
            state, body = self._state(tx, id_), tx.get(self.category, key("body", id_))
            if state is not None and body is not None:
                found.append(Stored(id_, body, state))
        return found

    def revive(self, tx: Transaction, id_: int | None, limit: int) -> int:
        """Put one dead letter, or the longest dead, at the end of the line as if it were new; return how many."""
        ids = self._ids(tx, _DEAD, limit) if id_ is None else [id_]
        dead = {one: state for one in ids if (state := self._state(tx, one)) is not None and state.kind == Kind.DEAD}
        for one, state in dead.items():
            self._move(tx, one, state, state._replace(kind=Kind.READY, attempt=0, place=0))
        return len(dead)

    def purge(self, tx: Transaction, age_ms: int, limit: int) -> int:
        """Delete dead letters that died so long ago; return how many."""
        ids = self._ids(tx, KeyRange(_DEAD.start, key("dead", tx.now_ms - age_ms + 1)), limit)
        for id_ in ids:
            state = self._state(tx, id_)
            if state is not None:
                self._delete(tx, id_, state)
        return len(ids)

    def count(self, tx: Transaction) -> list[int]:
        """Return how many are in each state."""
        head, _ = self._begin(tx)
        self._end(tx, head)
        return head.counts

    # -- moves ---------------------------------------------------------------------------------------------------

    def _begin(self, tx: Transaction) -> tuple[_Head, int]:
        """Read the head, and put in line what is due."""
        head, now_ms = _Head(tx.get(self.category, _HEAD)), tx.now_ms
        if head.wake_ms is not None and head.wake_ms <= now_ms:
            due = KeyRange(_TIME.start, key("time", now_ms + 1))
            for id_ in self._ids(tx, due, _DUE_MAX):
                state = self._state(tx, id_)
                if state is None:
                    raise Corrupt(f"message {id_} of queue {self.category!r} isn't whole")
                self._leave(tx, head, id_, state)
                if state.kind == Kind.DELAYED:
                    after = state._replace(kind=Kind.READY, place=0)
                elif state.attempt < self.terms.attempts_max:
                    after = state._replace(kind=Kind.READY, error=LEASE_OVER)
                else:
                    after = self._died(now_ms, state, LEASE_OVER)
                self._enter(tx, head, id_, after)
            following = tx.keys(self.category, _TIME, limit=1)
            head.wake_ms = following[0].parts[1] if following else None
        return head, now_ms

    def _end(self, tx: Transaction, head: _Head) -> None:
        """Write the head, and ring for those who wait."""
        encoded = head.encoded()
        if encoded == head.before:
            return
        tx.put(self.category, _HEAD, encoded)
        if head.lined_up:
            self.bell.ring(head.lined_up)
        elif head.wake_ms is not None and (head.wake_before_ms is None or head.wake_ms < head.wake_before_ms):
            self.bell.ring(1)  # whoever watches the clock has to know

    def _move(self, tx: Transaction, id_: int, state: State, after: State) -> bool:
        head = _Head(tx.get(self.category, _HEAD))
        self._leave(tx, head, id_, state)
        self._enter(tx, head, id_, after)
        self._end(tx, head)
        return True

    def _delete(self, tx: Transaction, id_: int, state: State) -> None:
        head = _Head(tx.get(self.category, _HEAD))
        self._leave(tx, head, id_, state)
        tx.delete(self.category, key("state", id_))
        tx.delete(self.category, key("body", id_))
        self._end(tx, head)

    def _leave(self, tx: Transaction, head: _Head, id_: int, state: State) -> None:
        """Take a message out of the state it is in."""
        tx.delete(self.category, _index(id_, state))
        head.counts[state.kind] -= 1

    def _enter(self, tx: Transaction, head: _Head, id_: int, state: State) -> None:
        """Put a message into a state. Place 0: the end of the line."""
        if state.kind == Kind.READY:
            head.lined_up += 1
            if state.place == 0:
                state = state._replace(place=head.next_number())
        elif state.kind != Kind.DEAD:
            head.wake_ms = state.when_ms if head.wake_ms is None else min(head.wake_ms, state.when_ms)
        tx.put(self.category, _index(id_, state), b"")
        tx.put(self.category, key("state", id_), CBOR.encode(list(state)))
        head.counts[state.kind] += 1

    def _died(self, now_ms: int, state: State, error: str | None) -> State:
        return state._replace(kind=Kind.DEAD, when_ms=now_ms, error=error)

    def _held(self, tx: Transaction, id_: int, token: int) -> State | None:
        """Return the state of a message whose present taking has this token."""
        state = self._state(tx, id_)
        return state if state is not None and state.kind == Kind.TAKEN and state.token == token else None

    def _state(self, tx: Transaction, id_: int) -> State | None:
        payload = tx.get(self.category, key("state", id_))
        if payload is None:
            return None
        parts: list[Any] = CBOR.decode(payload)
        return State(*parts)

    def _ids(self, tx: Transaction, key_range: KeyRange, limit: int) -> list[int]:
        """Return the messages of a part of an index."""
        return [found.parts[2] for found in tx.keys(self.category, key_range, limit=limit)]


def _index(id_: int, state: State) -> Any:
    """Return the key of the index row of a message."""
    if state.kind == Kind.READY:
        return key("line", state.place, id_)
    return key("dead" if state.kind == Kind.DEAD else "time", state.when_ms, id_)
