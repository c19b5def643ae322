"""A session: one connection to a server, straight on libpq, in its binary protocol.

Rules:
  1. A statement is prepared the first time a session runs it, by name, in the same round trip.
  2. Nothing blocks without a bound: a server that is silent for too long is given up, unless it, and no other of the
     hosts, answers somebody else; then it is busy with what it was asked.
  3. `broken` is set before anything is sent and cleared when all is answered: whatever comes in between, a Ctrl-C
     too, leaves a session that nobody uses again.
  4. Whoever is told `Unsent` can be sure that nothing was, or will be, committed.
  5. In a forked child the socket is closed and no word is said: the session is the parent's.

Doesn't know: what the statements are about, jobs, who shares sessions.
"""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Sequence
from time import monotonic
from typing import NamedTuple, TypeAlias

from psycopg import Error, pq
from psycopg.pq.abc import PGresult

from persistency.storage.postgres.address import Address
from persistency.storage.postgres.connecting import connected, connected_to, said
from persistency.storage.postgres.faults import UNKNOWN_SETTING, Lost, Refused, Unsent

Params: TypeAlias = Sequence[bytes | None]

UNSEEN_SECONDS = 0.5  # for so long nobody has used a session, and it is looked at before it is used again
SILENT_SECONDS = 30.0  # without a byte from the server, and it is asked elsewhere whether it lives
MESSAGE_BYTES_MAX = 1000 * 1024 * 1024  # the server cuts off whoever sends a message of a gigabyte
UNSENT_BYTES = 16 * 1024 * 1024  # so much is handed to libpq, which moves all of it at each partial send, and no more

# What makes plans steady on a server of the PostgreSQL kind; others may not know them, and needn't. A statement here
# always goes by an index: tables that have just grown have no statistics that would say so.
_SETTINGS = (
    b"SET plan_cache_mode = force_generic_plan",
    b"SET enable_seqscan = off",
    b"SET enable_hashjoin = off",
    b"SET enable_mergejoin = off",
    b"SET jit = off",
    b"SET idle_in_transaction_session_timeout = '15s'",  # who is paused in the middle of an opening keeps no lock
    b"SET tcp_keepalives_idle = 10",
    b"SET tcp_keepalives_interval = 5",
    b"SET tcp_keepalives_count = 3",
)
_GOOD = (pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK)
_BINARY = (1,) * 32  # as many parameters as any statement has, and more
_IDLE = pq.TransactionStatus.IDLE


class Statement(NamedTuple):
    """A statement by its name, unique among all that a session runs."""

    name: bytes
    sql: bytes


BEGIN = Statement(b"begin", b"BEGIN")
COMMIT = Statement(b"commit", b"COMMIT")
ROLLBACK = Statement(b"rollback", b"ROLLBACK")
_SYNCS = {
    True: Statement(b"syncs", b"SET synchronous_commit = on"),
    False: Statement(b"syncs_not", b"SET synchronous_commit = off"),
}


class Session:
    """One connection. `born` is when it was made, on the monotonic clock. Raises `Lost` if there can be none.

    `extra` are statements that it begins with; a server that doesn't know what they set is none the worse.
    """

    def __init__(self, address: Address, extra: Sequence[bytes] = ()) -> None:
        self.used_at: float = monotonic()
        self.broken: bool = False
        self._syncs: bool | None = None  # what a commit waits for; the server's default may be anything
        self._connect_seconds = address.connect_seconds
        self._known: set[bytes] = set()
        self._pid = os.getpid()
        self._connection, self._settings = connected(address)  # of this host: another one's life says nothing
        self.born: float = monotonic()
        self._poll = select.poll()
        self._poll.register(self._connection.socket, select.POLLIN)
        self._connection.nonblocking = 1
        try:
            settings = [(Statement(b"", sql), ()) for sql in (*_SETTINGS, *extra)]
            for result in self._send(settings, apart=True):
                if result.status not in _GOOD and (refused := _refused(result)).state not in UNKNOWN_SETTING:
                    raise refused
            self.set_syncs(True)
        except BaseException:
            self.close()
            raise

    # -- running statements ----------------------------------------------------------------------------------------

    def run(self, statement: Statement, params: Params) -> PGresult:
        """Run one statement; return its result. Raises `Refused` or `Lost`."""
        return self.receive() if self.send(statement, params) else self.pipe([(statement, params)])[0]

    def send(self, statement: Statement, params: Params) -> bool:
        """Send one statement and wait for nothing; return whether that was done: it must have been run before."""
        if statement.name not in self._known:
            return False
        connection = self._connection
        self.broken = True
        try:
            connection.send_query_prepared(statement.name, params, _BINARY[: len(params)], 1)
        except Error as error:
            raise Unsent(self._reason(error)) from error
        try:
            connection.flush()
        except Error as error:
            raise Lost(self._reason(error)) from error
        return True

    def receive(self) -> PGresult:
        """Return the result of what was sent. Raises `Refused` or `Lost`."""
        connection = self._connection
        try:
            result = self._next()
            if result is None:
                raise Lost(said(connection))
            while self._next() is not None:  # until the server is ready for more, which may come in a packet of its own
                pass
        except Error as error:
            raise Lost(str(error).strip()) from error
        if result.status not in _GOOD:
            raise self._failed(result)
        self.broken = False
        return result

    def pipe(self, steps: Sequence[tuple[Statement, Params]]) -> list[PGresult]:
        """Run statements in one round trip; return their results. The first that fails keeps the others from it."""
        return self._send(steps)

    def _send(self, steps: Sequence[tuple[Statement, Params]], *, apart: bool = False) -> list[PGresult]:
        """Send everything, then take the results; `apart`: one that fails doesn't harm those behind it."""
        connection = self._connection
        self.broken = True
        try:
            connection.enter_pipeline_mode()
            prepared = self._hand_over(steps, apart=apart)
        except (Error, Lost) as error:
            raise Unsent(f"nothing is committed, not all was sent: {self._reason(error)}") from error
        try:
            if not apart:
                connection.pipeline_sync()
            results = self._all(len(prepared), len(steps) if apart else 1)
            connection.exit_pipeline_mode()
        except Error as error:
            raise Lost(self._reason(error)) from error
        self._known |= {name for name, result in zip(prepared, results, strict=True) if result.status in _GOOD} - {b""}
        self.broken = False
        if not apart and (bad := next((result for result in results if result.status not in _GOOD), None)) is not None:
            raise self._failed(bad)
        return [result for name, result in zip(prepared, results, strict=True) if not name]

    def _hand_over(self, steps: Sequence[tuple[Statement, Params]], *, apart: bool) -> list[bytes]:
        """Hand statements to libpq, none too many at once; return what each result is of: a name prepared, or nothing.

        What ends a transaction is the last of them: whatever is raised, it wasn't sent.
        """
        connection = self._connection
        prepared: list[bytes] = []
        known = set(self._known)
        unsent = 0
        for (name, sql), params in steps:
            nbytes = sum(map(len, filter(None, params)))
            unsent += nbytes
            if unsent > UNSENT_BYTES:
                self._flush()
                unsent = nbytes
            if not name:
                connection.send_query_params(sql, None)
            else:
                if name not in known:
                    connection.send_prepare(name, sql)
                    known.add(name)
                    prepared.append(name)
                connection.send_query_prepared(name, params, _BINARY[: len(params)], 1)
            prepared.append(b"")
            if apart:
                connection.pipeline_sync()
        return prepared

    def _reason(self, error: Error | Lost) -> str:
        """Return why something failed: what the connection says, which psycopg doesn't always repeat."""
        if isinstance(error, Lost) or self._connection.status == pq.ConnStatus.OK:
            return str(error).strip()
        return said(self._connection)

    def _all(self, count: int, syncs: int) -> list[PGresult]:
        results: list[PGresult] = []
        while len(results) < count or syncs:
            result = self._next()
            if result is None:
                continue  # between the results of two statements
            if result.status == pq.ExecStatus.PIPELINE_SYNC:
                syncs -= 1
            else:
                results.append(result)
        return results

    def _next(self) -> PGresult | None:
        """Return the next result when it is there; `None` behind the last of a statement. Raises `Lost`."""
        connection = self._connection
        if connection.flush():
            self._flush()
        if connection.is_busy():
            silent = 1000 * SILENT_SECONDS
            while connection.is_busy():
                if not self._poll.poll(silent):
                    self._ask_around()
                connection.consume_input()
        result = connection.get_result()
        if connection.status != pq.ConnStatus.OK:
            raise Lost(said(connection))
        return result

    def _flush(self) -> None:
        connection = self._connection
        poll = select.poll()
        poll.register(connection.socket, select.POLLIN | select.POLLOUT)
        while connection.flush():
            ready = poll.poll(1000 * SILENT_SECONDS)
            if not ready:
                self._ask_around()
            if any(event & ~select.POLLOUT for _, event in ready):
                connection.consume_input()

    def _ask_around(self) -> None:
        """See whether this very server answers anybody; raise `Lost` if it doesn't."""
        try:
            connected_to(self._settings, self._connect_seconds).finish()
        except Lost as error:
            raise Lost(f"the server has been silent for {SILENT_SECONDS:g} s, and takes no connection") from error

    def _failed(self, result: PGresult) -> Refused | Lost:
        """Return what a result that isn't good says."""
        refused = _refused(result)
        self.broken = self._connection.status != pq.ConnStatus.OK or refused.state[:3] == b"57P"
        # With 57P.. the server goes down, or ends this session: that is as good as gone.
        return Lost(str(refused)) if self.broken else refused

    def told(self, seconds: float) -> list[str]:
        """Return what others have said on a channel that is listened to, as soon as it is something, or nothing."""
        connection = self._connection
        try:
            heard = self._heard()  # with the answer to something else
            if not heard and self._poll.poll(1000 * seconds):
                connection.consume_input()
                heard = self._heard()
        except Error as error:
            self.broken = True
            raise Lost(str(error).strip()) from error
        if connection.status != pq.ConnStatus.OK:
            self.broken = True
            raise Lost(said(connection))
        return heard

    def _heard(self) -> list[str]:
        return [notice.extra.decode(errors="replace") for notice in iter(self._connection.notifies, None)]

    def is_cut_off(self) -> bool:
        """Say whether the other side has ended the connection while nobody used it; one just used isn't looked at."""
        if monotonic() - self.used_at < UNSEEN_SECONDS or not self._poll.poll(0):
            return False
        try:
            self._connection.consume_input()
        except Error:
            return True
        return self._connection.status != pq.ConnStatus.OK

    def set_syncs(self, syncs: bool) -> None:
        """Say whether a commit is answered only when it is on the medium."""
        if syncs != self._syncs:
            self._syncs = None
            self.run(_SYNCS[syncs], ())
            self._syncs = syncs

    def roll_back(self) -> None:
        """End a transaction that is open, if the session is sound."""
        if not self.broken and self._connection.transaction_status != _IDLE:
            self.run(ROLLBACK, ())

    @property
    def idle(self) -> bool:
        """Whether somebody else can use it: nothing is under way, no transaction is open."""
        return not self.broken and self._connection.transaction_status == _IDLE

    # -- the end ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Say goodbye and close the socket."""
        self.broken = True
        if os.getpid() == self._pid:
            self._connection.finish()

    def forsake(self) -> None:
        """In a forked child: close the socket without a word."""
        self.broken = True
        with contextlib.suppress(Exception):
            os.close(self._connection.socket)


def _refused(result: PGresult) -> Refused:
    state = result.error_field(pq.DiagnosticField.SQLSTATE) or b"?????"
    text = result.error_field(pq.DiagnosticField.MESSAGE_PRIMARY) or result.error_message
    return Refused(state, text.decode(errors="replace").strip())
