"""A read ahead of its turn: sent by whoever asks, while whoever answers is still being woken.

The server answers meanwhile, so that one who reads row by row waits for one of the two and not for both.

Rules:
  1. It is sent only where that waits for nothing: over the session at hand, for a job that is certain to be as it was
     left.
  2. It counts only if its message is the very next thing that is done; else its answer is taken off the session and
     thrown away.
  3. Nobody owes it an answer: whatever goes wrong, its message is asked in its turn.

Doesn't know: what is read.
"""

from __future__ import annotations

from psycopg.pq.abc import PGresult

from persistency.storage.postgres.faults import Lost, Refused
from persistency.storage.postgres.pool import Holder, Pool
from persistency.storage.postgres.session import Params, Statement
from persistency.storage.postgres.standing import Standing


class Ahead:
    """The read ahead of one store: at most one is under way."""

    def __init__(self, pool: Pool, holder: Holder, standing: Standing) -> None:
        self.message: object | None = None  # what was sent
        self._pool = pool
        self._holder = holder
        self._standing = standing

    def send(self, message: object, statement: Statement, params: Params) -> None:
        """Send a statement for a message that is about to be posted, if that waits for nothing."""
        session = self._pool.at_hand(self._holder)
        if session is None:
            return
        try:
            if self._standing.is_sure(session) and session.send(statement, params):
                self.message = message
        except Lost:
            pass  # the session is given up, and the read asks another one in its turn
        finally:
            self._pool.park(self._holder, busy=self.message is message)

    def receive(self) -> PGresult | None:
        """Take what was asked off the session and return it; `None` if it has to be asked again."""
        self.message = None
        session = self._pool.at_hand(self._holder, busy=True)
        if session is None:  # somebody else needed it more
            return None
        try:
            return session.receive()
        except (Lost, Refused):
            self._standing.unsure = True
            return None
        finally:
            self._pool.park(self._holder)
