"""The bell: tells those who follow jobs that others own when something was committed there.

A commit of a job that keeps its changes rings on the server, with the job's version; whoever follows listens. Where
the server knows no such bell the versions are asked for, over and over. What was committed is in the tables: a ring
says no more than that it is worth looking.

Rules:
  1. A ring that is missed is made up for: whenever listening begins, and now and then, the versions are asked for.
  2. Anybody with an account can ring: nothing that a ring says is believed but for whom it is.
  3. One connection and one thread for all who follow; both are gone soon after the last has left. Whatever goes wrong
     is told, and tried again.

Doesn't know: what a change is, readers, threads that wait.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from time import monotonic

from persistency.logfields import about
from persistency.storage.postgres import packing
from persistency.storage.postgres.address import Address
from persistency.storage.postgres.faults import Refused
from persistency.storage.postgres.reads import State, state_of, value
from persistency.storage.postgres.schema import Statements
from persistency.storage.postgres.session import Session, Statement

log: logging.Logger = logging.getLogger("persistency.storage")

POLL_SECONDS = 0.5  # between two questions where there is no bell, and two looks whether anybody still follows
LOOK_SECONDS = 10.0  # between two questions where there is one

Tell = Callable[[State | None], None]


class Bell:
    """The bell of one root. What is told is how a job stands, or `None`: that has to be looked at."""

    def __init__(self, address: Address, statements: Statements) -> None:
        self._address = address
        self._statements = statements
        self._lock = threading.RLock()  # a signal handler may open a reader too
        self._followers: dict[object, tuple[str, Tell]] = {}
        self._thread: threading.Thread | None = None
        self._session: Session | None = None
        self._told = ""

    def follow(self, job: str, tell: Tell) -> object:
        """Have `tell` called, in a thread of the bell's, whenever a job may have another version; return a token."""
        token = object()
        with self._lock:
            self._followers[token] = job, tell
            thread = self._thread
            if thread is None or not thread.is_alive():
                thread = self._thread = threading.Thread(target=self._run, name="persistency:bell", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # the interpreter ends
                    self._thread = None
                except BaseException:  # a Ctrl-C: whoever follows next starts another one
                    self._followers.pop(token, None)
                    if self._thread is thread and not thread.is_alive():
                        self._thread = None
                    raise
        return token

    def leave(self, token: object) -> None:
        """Tell somebody no more."""
        with self._lock:
            self._followers.pop(token, None)

    def _run(self) -> None:
        session: Session | None = None
        hears, ask_at = False, 0.0
        while self._goes_on():
            try:
                if session is None:
                    session = self._session = Session(self._address)
                    hears, ask_at = self._listen(session), 0.0
                if not hears or monotonic() >= ask_at:
                    self._ask(session)
                    ask_at = monotonic() + LOOK_SECONDS
                self._rung(session.told(POLL_SECONDS))
                self._told = ""
            except Exception as error:
                if str(error) != self._told:
                    self._told = str(error)
                    fields = about("bell_not_heard", None, error)
                    log.warning("followers can't be told of commits, it is tried again: %s", error, extra=fields)
                self._disconnect(session)
                session = None
                threading.Event().wait(POLL_SECONDS)
        self._disconnect(session)

    def _goes_on(self) -> bool:
        """Say whether the calling thread is the bell's, and somebody follows; if nobody does it is no longer."""
        with self._lock:
            if self._thread is not threading.current_thread():  # it was held to be dead before it began
                return False
            if not self._followers:
                self._thread = None
            return bool(self._followers)

    def _disconnect(self, session: Session | None) -> None:
        if session is not None:
            if self._session is session:
                self._session = None
            session.close()

    def forsake(self) -> None:
        """In a forked child: the thread isn't there, its session is the parent's."""
        session, self._session = self._session, None
        if session is not None:
            session.forsake()

    def _listen(self, session: Session) -> bool:
        """Listen, and return whether the server can be listened to."""
        try:
            session.run(Statement(b"", f'LISTEN "{self._statements.channel}"'.encode()), ())
        except Refused as refused:
            log.info(
                "commits are asked for, the server has no bell: %s", refused, extra=about("no_bell", None, refused)
            )
            return False
        return True

    def _ask(self, session: Session) -> None:
        with self._lock:
            jobs = sorted({job for job, _ in self._followers.values()})
        if jobs:
            result = session.run(self._statements["versions"], (packing.texts(jobs),))
            found = {value(result, at, 3).decode(): state_of(result, at) for at in range(result.ntuples)}
            self._tell({job: found.get(job) for job in jobs})

    def _rung(self, rings: Iterable[str]) -> None:
        """Tell those whose jobs are named behind a version; whatever else was said is of nobody's job."""
        self._tell(dict.fromkeys(ring.partition(" ")[2] for ring in rings))

    def _tell(self, states: Mapping[str, State | None]) -> None:
        with self._lock:
            followers = list(self._followers.values()) if states else []
        for job, tell in followers:
            if job in states:
                tell(states[job])
