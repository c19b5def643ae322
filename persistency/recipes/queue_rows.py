"""A queue's rows: what each of its verbs does to them, inside a transaction.

All are in one category. A message is in one state at a time; its state row says in which, and one index row where:

    ("body", id)         its value, written once
    ("state", id)        what else is known of it
    ("line", place, id)  it is ready; who takes takes the lowest place
    ("time", ms, id)     it is delayed until then, or taken with a lease until then
    ("dead", ms, id)     it is a dead letter since then
    ("head",)            the last number given, the counts, and before when nothing is due in "time"

The head and the states have a fixed width (but for the text of a long error): a message that was put can be taken and
told anything in a job that is full.

Rules:
  1. Numbers (ids, places, tokens) come from one counter and are never given twice.
  2. Each taking has a token. Whoever acknowledges, retries or extends shows it: a token that isn't the present one,
     because the lease was over and the message was put in line again, changes nothing.
  3. What is due is put in line before anything is put, taken or counted, so many at a time: a message whose delay is
     over at the end of the line, one whose lease is over at its old place, or among the dead after its last attempt.
  4. Each verb reads and writes a few rows by their keys, however long the queue is.
  5. Those who wait are rung for inside the transaction: what they then ask the job for comes behind it.
  6. A message whose rows are damaged holds up no other: it is logged, and is a dead letter if its value is there.

Doesn't know: jobs, threads, values.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, TypeAlias

from persistency import KeyRange, Transaction, key
from persistency.logfields import about
from persistency.recipes.queue_records import ATTEMPTS_MAX, Head, Kind, State, Stored, Terms, foreign
from persistency.recipes.waiting import Bell

log: logging.Logger = logging.getLogger("persistency.recipes")

_DUE_MAX = 64  # so many at a time are put in line
_TAKEN_BYTES_MAX = 16 * 1024 * 1024  # beyond this `take` gives no more of them at once
_HEAD = key("head")
_LINE = KeyRange.prefix(key("line"))
_TIME = KeyRange.prefix(key("time"))
_DEAD = KeyRange.prefix(key("dead"))
LEASE_OVER = "its lease was over"
DAMAGED = "its rows were damaged"
_Where: TypeAlias = tuple[str, int, int]  # the parts of an index row's key


class Rows:
    """The rows of one queue. Its methods are run inside the job, but for `bell`, which is rung by them."""

    def __init__(self, category: str, terms: Terms, bell: Bell) -> None:
        self.category = category
        self.terms = terms
        self.bell = bell

    # -- verbs ---------------------------------------------------------------------------------------------------

    def put(self, tx: Transaction, delay_ms: int, *bodies: bytes) -> list[int]:
        """Put messages at the end of the line, or have them wait first; return their ids.

        The bodies are arguments of their own: so a runner sees how many bytes wait with the call.
        """
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
        attempts_max = min(self.terms.attempts_max, ATTEMPTS_MAX)
        for id_, state, body in self._ready(tx, head, limit):
            self._leave(tx, head, id_, state)
            state = state._replace(
                kind=Kind.TAKEN,
                attempt=state.attempt + 1,
                when_ms=now_ms + lease_ms,
                token=head.next_number(),
                attempts_max=attempts_max,
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
        for where in self._index_rows(tx, _DEAD, limit):
            body = tx.get(self.category, key("body", where[2]))
            if body is not None:
                found.append(Stored(where[2], body, self._dead_state(tx, where)))
        return found

    def revive(self, tx: Transaction, id_: int | None, limit: int) -> int:
        """Put one dead letter, or the longest dead, at the end of the line as if it were new; return how many."""
        if id_ is None:
            dead = {where[2]: self._dead_state(tx, where) for where in self._index_rows(tx, _DEAD, limit)}
        else:
            known = self._state(tx, id_)
            dead = {id_: known} if known is not None and known.kind == Kind.DEAD else {}
        for one, state in dead.items():
            self._move(tx, one, state, state._replace(kind=Kind.READY, attempt=0, place=0))
        return len(dead)

    def purge(self, tx: Transaction, age_ms: int, limit: int) -> int:
        """Delete dead letters that died so long ago; return how many."""
        found = self._index_rows(tx, KeyRange(_DEAD.start, key("dead", tx.now_ms - age_ms + 1)), limit)
        for where in found:
            self._delete(tx, where[2], self._dead_state(tx, where))
        return len(found)

    def count(self, tx: Transaction) -> list[int]:
        """Return how many are in each state."""
        head, _ = self._begin(tx)
        self._end(tx, head)
        return head.counts

    # -- moves ---------------------------------------------------------------------------------------------------

    def _begin(self, tx: Transaction) -> tuple[Head, int]:
        """Read the head, and put in line what is due."""
        head, now_ms = self._head(tx), tx.now_ms
        if head.wake_ms is not None and head.wake_ms <= now_ms:
            due = KeyRange(_TIME.start, key("time", now_ms + 1))
            for where in self._index_rows(tx, due, _DUE_MAX):
                id_ = where[2]
                state = self._state(tx, id_)
                if state is None:
                    self._give_up(tx, head, where)
                    continue
                self._leave(tx, head, id_, state)
                if state.kind == Kind.DELAYED:
                    after = state._replace(kind=Kind.READY, place=0)
                elif state.attempt < state.attempts_max:
                    after = state._replace(kind=Kind.READY, error=LEASE_OVER)
                else:
                    after = self._died(now_ms, state, LEASE_OVER)
                self._enter(tx, head, id_, after)
            following = self._index_rows(tx, _TIME, 1)
            head.wake_ms = following[0][1] if following else None
        return head, now_ms

    def _end(self, tx: Transaction, head: Head) -> None:
        """Write the head, and ring for those who wait."""
        encoded = head.encoded()
        if encoded == head.before or head.last == 0:  # the first look at an empty queue needs no room
            return
        tx.put(self.category, _HEAD, encoded)
        if head.lined_up:
            self.bell.ring(head.lined_up)
        elif head.wake_ms is not None and (head.wake_before_ms is None or head.wake_ms < head.wake_before_ms):
            self.bell.ring(1)  # whoever watches the clock has to know

    def _move(self, tx: Transaction, id_: int, state: State, after: State) -> bool:
        head = self._head(tx)
        self._leave(tx, head, id_, state)
        self._enter(tx, head, id_, after)
        self._end(tx, head)
        return True

    def _delete(self, tx: Transaction, id_: int, state: State) -> None:
        head = self._head(tx)
        self._leave(tx, head, id_, state)
        tx.delete(self.category, key("state", id_))
        tx.delete(self.category, key("body", id_))
        self._end(tx, head)

    def _leave(self, tx: Transaction, head: Head, id_: int, state: State) -> None:
        """Take a message out of the state it is in."""
        tx.delete(self.category, _index(id_, state))
        head.counts[state.kind] -= 1

    def _enter(self, tx: Transaction, head: Head, id_: int, state: State) -> None:
        """Put a message into a state. Place 0: the end of the line."""
        if state.kind == Kind.READY:
            head.lined_up += 1
            if state.place == 0:
                state = state._replace(place=head.next_number())
        elif state.kind != Kind.DEAD:
            head.wake_ms = state.when_ms if head.wake_ms is None else min(head.wake_ms, state.when_ms)
        tx.put(self.category, _index(id_, state), b"")
        tx.put(self.category, key("state", id_), state.encoded())
        head.counts[state.kind] += 1

    def _died(self, now_ms: int, state: State, error: str | None) -> State:
        return state._replace(kind=Kind.DEAD, when_ms=now_ms, error=error)

    def _held(self, tx: Transaction, id_: int, token: int) -> State | None:
        """Return the state of a message whose present taking has this token."""
        state = self._state(tx, id_)
        return state if state is not None and state.kind == Kind.TAKEN and state.token == token else None

    def _state(self, tx: Transaction, id_: int) -> State | None:
        """Return the state of a message; `None` if there is none, or only a damaged one."""
        payload = tx.get(self.category, key("state", id_))
        return None if payload is None else State.decoded(payload)

    def _dead_state(self, tx: Transaction, where: _Where) -> State:
        """Return the state of a dead letter, as far as it is known."""
        return self._state(tx, where[2]) or State(Kind.DEAD, 0, 0, where[1], 0, where[1], DAMAGED)

    # -- rows ----------------------------------------------------------------------------------------------------

    def _head(self, tx: Transaction) -> Head:
        payload = tx.get(self.category, _HEAD)
        if payload is None and tx.keys(self.category, limit=1):
            raise foreign()
        return Head(payload)

    def _index_rows(self, tx: Transaction, key_range: KeyRange, limit: int) -> list[_Where]:
        """Return the rows of a part of an index."""
        found = [one.parts for one in tx.keys(self.category, key_range, limit=limit)]
        if any(len(parts) != 3 or type(parts[1]) is not int or type(parts[2]) is not int for parts in found):
            raise foreign()
        return found

    def _ready(self, tx: Transaction, head: Head, limit: int) -> Iterator[tuple[int, State, bytes]]:
        """Go through the first messages in line, and past those that are damaged."""
        while limit:
            damaged = 0
            for where in self._index_rows(tx, _LINE, limit):
                state, body = self._state(tx, where[2]), tx.get(self.category, key("body", where[2]))
                if state is None or body is None:
                    self._give_up(tx, head, where)
                    damaged += 1
                else:
                    yield where[2], state, body
            limit = damaged

    def _give_up(self, tx: Transaction, head: Head, where: _Where) -> None:
        """Take a message that isn't whole out of the way: if its value is there it is a dead letter."""
        index, _, id_ = where
        tx.delete(self.category, key(*where))
        # Which of the two it was nobody knows any more; no count is to fall below 0.
        timed = Kind.TAKEN if head.counts[Kind.TAKEN] else Kind.DELAYED
        kind = Kind.READY if index == "line" else timed
        head.counts[kind] = max(0, head.counts[kind] - 1)
        kept = tx.exists(self.category, key("body", id_))
        if kept:
            self._enter(tx, head, id_, State(Kind.DEAD, 0, 0, tx.now_ms, 0, tx.now_ms, DAMAGED))
        else:
            tx.delete(self.category, key("state", id_))
        fields = about("message_damaged", tx.job_id, queue=self.category, message=id_)
        outcome = "a dead letter" if kept else "lost"
        log.error("queue %r: message %d isn't whole, and is %s", self.category, id_, outcome, extra=fields)


def _index(id_: int, state: State) -> Any:
    """Return the key of the index row of a message."""
    if state.kind == Kind.READY:
        return key("line", state.place, id_)
    return key("dead" if state.kind == Kind.DEAD else "time", state.when_ms, id_)
